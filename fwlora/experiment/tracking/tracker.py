"""Interfaces that write the record of a run and read it, and the check of what can be recorded."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from fwlora.experiment.json_types import JsonMapping, JsonObject, JsonValue
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.records import RowKey, RunRecord


class Tracker(ABC):
    """Write the record of one run while it is running."""

    @abstractmethod
    def log(self, values: Mapping[str, float | int]) -> None:
        """Add one history row, which holds its own ``global_step``; see :func:`check_row`."""

    @abstractmethod
    def update_config(self, values: JsonMapping) -> None:
        """Set top-level config entries, replacing those of the same name; see :func:`check_entries`."""

    @abstractmethod
    def set_summary(self, values: JsonMapping) -> None:
        """Set final values, replacing those of the same name; see :func:`check_entries`."""

    @abstractmethod
    def finish(self, exit_code: int = 0) -> None:
        """End the record; exit code 0 marks a run that did all it had to do."""

    def recorded_rows(self, attempts: Sequence[int]) -> Collection[RowKey]:
        """Return the keys of the history rows that earlier attempts have recorded, which are not to be logged again.

        Args:
            attempts: numbers of the attempts that this one continues, as the config entry ``attempt`` of each says.
        """
        return ()

    def problem(self) -> str | None:
        """Return why the record is not whole, once it is ended; None of one that is."""
        return None


class RecordSource(ABC):
    """Read recorded runs."""

    @abstractmethod
    def load(self, run_ids: Sequence[str]) -> list[RunRecord]:
        """Return the records of runs, in the order of their ids.

        Build each with :func:`fwlora.experiment.tracking.records.make_record`.

        Raises:
            UnreadableRunsError: some runs cannot be read; it gives a reason for each of them.
        """


def check_row(values: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return a copy of one history row.

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


def check_entries(values: JsonMapping) -> JsonObject:
    """Return a deep copy of config or summary entries in the types of JSON (tuples become lists; NaN is allowed).

    Raises:
        ValueError: a name that cannot be recorded or a value that JSON has no type for, with its path.
    """
    for name in values:
        _check_name(name)
    return {name: _to_json(value, name) for name, value in values.items()}


def _check_name(name: object) -> None:
    """Refuse dots, which trackers read as nesting, and leading underscores, which mark their own names."""
    if not isinstance(name, str) or not name or name.startswith("_") or "." in name:
        raise ValueError(f"{name!r} cannot name a metric: a string without dots or a leading underscore is needed")


def _to_json(value: JsonValue, path: str) -> JsonValue:
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


def spell_non_finite(value: JsonValue) -> JsonValue:
    """Replace non-finite floats by ``"NaN"``, ``"Infinity"``, ``"-Infinity"``: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {name: spell_non_finite(item) for name, item in value.items()}
    return [spell_non_finite(item) for item in value] if isinstance(value, list) else value


def restore_non_finite(value: JsonValue) -> JsonValue:
    """Invert :func:`spell_non_finite`."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
    if isinstance(value, Mapping):
        return {name: restore_non_finite(item) for name, item in value.items()}
    return [restore_non_finite(item) for item in value] if isinstance(value, list) else value


class NullTracker(Tracker):
    """Check entries as other trackers do, and keep nothing."""

    def log(self, values: Mapping[str, float | int]) -> None:
        """Check one history row; see :func:`check_row`."""
        check_row(values)

    def update_config(self, values: JsonMapping) -> None:
        """Check config entries; see :func:`check_entries`."""
        check_entries(values)

    def set_summary(self, values: JsonMapping) -> None:
        """Check summary entries; see :func:`check_entries`."""
        check_entries(values)

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""
