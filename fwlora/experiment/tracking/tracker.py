"""Where a run's metrics go, as a small protocol; nothing in this module knows Weights & Biases."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.records import RunRecord, RunState, make_record


class Tracker(Protocol):
    """Record of one run while it is running.

    Attributes:
        url: where people can watch the run, ``None`` when there is no such place.
    """

    url: str | None

    def log(self, values: Mapping[str, float | int]) -> None:
        """Add one history row; it carries its own ``global_step``."""

    def update_config(self, values: Mapping[str, Any]) -> None:
        """Set top-level config entries, replacing those of the same name."""

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Set final values, replacing those of the same name."""

    def finish(self, exit_code: int = 0) -> None:
        """End the record; 0 marks a run that did all it had to do."""


def check_row(values: Mapping[str, float | int]) -> dict[str, float | int]:
    """A copy of one history row.

    Raises:
        ValueError: a name that cannot be recorded, a value that is not a Python number, or no ``global_step``.
    """
    for name, value in values.items():
        _check_name(name)
        if not isinstance(value, int | float):
            raise ValueError(f"history value `{name}` is a {type(value).__name__}; convert it with float() or int()")
    if metrics.GLOBAL_STEP not in values:
        raise ValueError(f"a history row without `{metrics.GLOBAL_STEP}` is lost on reading; got {sorted(values)}")
    return dict(values)


def check_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of config or summary entries in the types of JSON (tuples become lists; NaN is allowed).

    Raises:
        ValueError: a name that cannot be recorded or a value that JSON has no type for, with its path.
    """
    for name in values:
        _check_name(name)
    return {name: _to_json(value, name) for name, value in values.items()}


def _check_name(name: object) -> None:
    """Trackers read a dot as nesting and keep names with a leading underscore for themselves."""
    if not isinstance(name, str) or not name or name.startswith("_") or "." in name:
        raise ValueError(f"{name!r} cannot name a metric: a string without dots or a leading underscore is needed")


def _to_json(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"`{path}` has the key {name!r}: JSON objects have string keys")
        return {name: _to_json(item, f"{path}.{name}") for name, item in value.items()}
    raise ValueError(f"`{path}` is a {type(value).__name__}, which JSON has no type for")


def spell_non_finite(value: Any) -> Any:
    """Replace non-finite floats by ``"NaN"``, ``"Infinity"``, ``"-Infinity"``: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {name: spell_non_finite(item) for name, item in value.items()}
    return [spell_non_finite(item) for item in value] if isinstance(value, list) else value


def restore_non_finite(value: Any) -> Any:
    """Inverse of :func:`spell_non_finite`."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
    if isinstance(value, Mapping):
        return {name: restore_non_finite(item) for name, item in value.items()}
    return [restore_non_finite(item) for item in value] if isinstance(value, list) else value


class NullTracker:
    """Keeps nothing, but refuses what a real tracker could not keep, so that a trial run exercises the record path."""

    url: str | None = None

    def log(self, values: Mapping[str, float | int]) -> None:
        """Check one history row; see :func:`check_row`."""
        check_row(values)

    def update_config(self, values: Mapping[str, Any]) -> None:
        """Check config entries; see :func:`check_entries`."""
        check_entries(values)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Check summary entries; see :func:`check_entries`."""
        check_entries(values)

    def finish(self, exit_code: int = 0) -> None:
        """Nothing to end."""


class MemoryTracker:
    """Keeps everything in memory, for tests and for library users without a tracking service.

    Attributes:
        rows: history rows as logged.
        config: entries by name.
        summary: entries by name; only what was set, history values are not copied into it.
        exit_code: what :meth:`finish` was told, ``None`` before.
    """

    url: str | None = None

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, values: Mapping[str, float | int]) -> None:
        """Append one history row; see :func:`check_row`."""
        self.rows.append(check_row(values))

    def update_config(self, values: Mapping[str, Any]) -> None:
        """Set config entries; see :func:`check_entries`."""
        self.config.update(check_entries(values))

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Set summary entries; see :func:`check_entries`."""
        self.summary.update(check_entries(values))

    def finish(self, exit_code: int = 0) -> None:
        """Keep the exit code."""
        self.exit_code = exit_code

    def record(self, run_id: str) -> RunRecord:
        """The run in the form that evaluation reads."""
        state: RunState = "running" if self.exit_code is None else "failed" if self.exit_code else "finished"
        return make_record(run_id, self.config, self.summary, self.rows, state, source="memory")
