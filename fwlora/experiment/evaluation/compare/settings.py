"""Recorded settings of runs, read as values; as JSON text for display only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel

from fwlora.experiment.settings.schema import RunSettings, run_settings_class
from fwlora.experiment.tracking.records import canonicalise

_MAX_LABEL_LENGTH = 24  # characters
Value = TypeVar("Value")


def read_settings(node: Mapping[str, Any]) -> RunSettings:
    """Build settings from a recorded run node without validation, so that runs of older programs can be read.

    Args:
        node: ``config["run"]``; unknown keys are ignored, missing ones keep their default or are None.

    Raises:
        AttributeError: a section that is not a mapping.
    """
    return cast(RunSettings, _construct(run_settings_class(), node))


def _construct(model: type[BaseModel], node: Mapping[str, Any]) -> BaseModel:
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        value = node.get(field.alias or name)
        section = _find_section(field.annotation)
        if section is not None and (value is not None or field.is_required()):
            value = _construct(section, value or {})
        elif value is None and not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data={})
        values[name] = value
    return model.model_construct(**values)


def _find_section(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def flatten_settings(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a node to values by dotted key; null counts as absent, the search space as one value.

    Args:
        node: mappings of mappings.
        prefix: of all keys.
    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "optuna.search_space":
            flat.update(flatten_settings(value, f"{name}."))
        elif value is not None:
            flat[name] = value
    return flat


def format_setting(value: Any) -> str:
    """Write a setting as JSON, 1.0 as 1; a missing one as ``None``."""
    return "None" if value is None else json.dumps(canonicalise(value), sort_keys=True, ensure_ascii=False)


def shorten_setting(value: Any) -> str:
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
