"""A run as a source of records gives it, before it has the one form that evaluation sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking import tracker as tracking
from fwlora.experiment.tracking.records import RunRecord, RunState, make_record


class Unavailable(Exception):
    """A source cannot give a run; the message says why."""


@dataclass
class RawRun:
    """A run, or one attempt at it.

    Attributes:
        source: where it was read, for people.
        config: entries by name, W&B's own (leading underscore) among them.
        summary: likewise.
        rows: history rows in the order of the source.
        state: how it ended.
    """

    source: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    state: RunState = "crashed"

    def to_record(self, run_id: str) -> RunRecord:
        """Without W&B's own entries, non-finite numbers restored, each step once; the same from every source."""
        rows = (_clean(row) for row in _order_attempts(self.rows))
        return make_record(run_id, _clean(self.config), _clean(self.summary), rows, self.state, self.source)


def _clean(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tracking.restore_non_finite(v) for name, v in entries.items() if not name.startswith("_")}


def _order_attempts(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Rows as they were logged, for a run of several attempts that reached the server in another order.

    What a dead server missed of the first attempt is sent after the second one. The clock says which came first; it is
    not asked where steps ascend anyway, as it may be set back while a run is under way.
    """
    given = (row.get(metrics.GLOBAL_STEP) for row in rows)
    steps = [step if isinstance(step, int | float) else 0 for step in given]
    if all(earlier <= later for earlier, later in pairwise(steps)):
        return rows
    return sorted(rows, key=lambda row: row.get("_timestamp") or 0.0)
