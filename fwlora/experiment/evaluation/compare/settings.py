"""Recorded settings of runs, read as values; as JSON text for display only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fwlora.experiment.json_types import JsonMapping, JsonObject, JsonValue
from fwlora.experiment.tracking.records import canonicalize

_MAX_LABEL_LENGTH = 24  # characters
Value = TypeVar("Value")


def flatten_settings(node: JsonMapping, prefix: str = "") -> JsonObject:
    """Flatten a node to values by dotted key; null counts as absent, the search space as one value.

    Args:
        node: mappings of mappings.
        prefix: of all keys.
    """
    flat: JsonObject = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "optuna.search_space":
            flat.update(flatten_settings(value, f"{name}."))
        elif value is not None:
            flat[name] = value
    return flat


def format_setting(value: JsonValue) -> str:
    """Write a setting as JSON, 1.0 as 1; a missing one as ``None``."""
    return "None" if value is None else json.dumps(canonicalize(value), sort_keys=True, ensure_ascii=False)


def shorten_setting(value: JsonValue) -> str:
    """Write a setting for a label: a long one by its hash, a missing one as ``unset``."""
    if value is None:
        return "unset"
    text = format_setting(value).strip('"')
    return text if len(text) <= _MAX_LABEL_LENGTH else "#" + hashlib.sha256(text.encode()).hexdigest()[:6]


def list_distinct(values: Iterable[Value]) -> list[Value]:
    """List different values in order of appearance; unlike in a set, they need not be hashable."""
    distinct: list[Value] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct
