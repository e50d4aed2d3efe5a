"""A tracker that keeps a run in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fwlora.experiment.tracking import Tracker
from fwlora.experiment.tracking.records import RunRecord, RunState, make_record
from fwlora.experiment.tracking.tracker import check_entries, check_row


class MemoryTracker(Tracker):
    """Keep what is recorded in lists and dictionaries.

    Attributes:
        rows: history rows as logged.
        config: entries by name.
        summary: entries by name; only what was set, history values are not copied into it.
        exit_code: of :meth:`finish`, ``None`` before.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float | int]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, values: Mapping[str, float | int]) -> None:
        self.rows.append(check_row(values))

    def update_config(self, values: Mapping[str, Any]) -> None:
        self.config.update(check_entries(values))

    def set_summary(self, values: Mapping[str, Any]) -> None:
        self.summary.update(check_entries(values))

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code

    def record(self, run_id: str) -> RunRecord:
        """Return the run in the form that evaluation reads."""
        state: RunState = "running" if self.exit_code is None else "failed" if self.exit_code else "finished"
        return make_record(run_id, self.config, self.summary, self.rows, state, source="memory")
