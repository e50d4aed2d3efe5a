"""A run as its source has it, before it is converted to a :class:`RunRecord`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.settings.modes import known_modes
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking import tracker as tracking
from fwlora.experiment.tracking.records import RunRecord, RunState, make_record


class RunUnavailableError(Exception):
    """A run that cannot be read; the message says why."""


@dataclass
class RawRun:
    """A run, or one attempt at it.

    Attributes:
        source: where it was read, for people.
        config: entries by name, W&B's own (leading underscore) among them.
        summary: likewise.
        rows: history rows in the order of the source.
        state: how it ended.
        place: where the server has it, as ``entity/project/run_id``; empty of a run that was recorded offline.
    """

    source: str
    config: JsonObject = field(default_factory=dict)
    summary: JsonObject = field(default_factory=dict)
    rows: list[JsonObject] = field(default_factory=list)
    state: RunState = "crashed"
    place: str = ""

    @property
    def project(self) -> str:
        """The project that it was recorded in; empty where it does not say."""
        node = self.config.get("wandb")
        return str(node.get("project", "")) if isinstance(node, Mapping) else ""

    @property
    def is_apart(self) -> bool:
        """Whether it was made in a mode whose runs are recorded apart from others."""
        mode = known_modes().get(str(self.config.get("mode")))
        return bool(mode and mode.project_suffix)

    @property
    def attempt(self) -> tuple[int, list[int]]:
        """The attempt's number, and those that it continues; 0 and none of a record that has no attempts."""
        node = self.config.get("attempt")
        if not isinstance(node, Mapping) or not isinstance(node.get("number"), int):
            return 0, []
        chain = node.get("chain")
        return node["number"], list(chain) if isinstance(chain, list) else []

    @property
    def started(self) -> float:
        """When the attempt started, in seconds since 1970; 0 of a record that does not say."""
        node = self.config.get("attempt")
        with suppress(TypeError, ValueError, KeyError):
            return datetime.fromisoformat(node["started"]).timestamp() if isinstance(node, Mapping) else 0.0
        return 0.0

    def to_record(self, run_id: str) -> RunRecord:
        """Drop W&B's own entries, restore non-finite numbers, keep each step once; the same for every source."""
        rows = (_clean(row) for row in _order_attempts(self.rows))
        return make_record(run_id, _clean(self.config), _clean(self.summary), rows, self.state, self.source, self.place)


def _clean(entries: JsonMapping) -> JsonObject:
    return {name: tracking.restore_non_finite(v) for name, v in entries.items() if not name.startswith("_")}


def _order_attempts(rows: Sequence[JsonObject]) -> Sequence[JsonObject]:
    """Sort rows of several attempts that reached the server in another order than they were logged in.

    Rows of the first attempt that a dead server missed are sent after the second attempt. Rows are sorted by timestamp
    only if steps are not already ascending: clocks may jump.
    """
    given = (row.get(metrics.GLOBAL_STEP) for row in rows)
    steps = [step if isinstance(step, int | float) else 0 for step in given]
    if all(earlier <= later for earlier, later in pairwise(steps)):
        return rows
    return sorted(rows, key=lambda row: row.get("_timestamp") or 0.0)
