"""Names for the values of JSON documents: settings and results as records and files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

# Any: a recursive type would have every reader narrow each level by hand, and records are checked where they are read.
JsonValue: TypeAlias = Any
JsonMapping: TypeAlias = Mapping[str, JsonValue]
JsonObject: TypeAlias = dict[str, JsonValue]
