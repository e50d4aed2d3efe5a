"""A tracker as a third party adds it: a settings class and one call of ``register_tracker``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from fwlora.experiment.tracking import (
    RecordSource,
    Tracker,
    TrackerSettings,
    known_trackers,
    register_tracker,
    unregister_tracker,
)
from fwlora.experiment.tracking.records import RunRecord, UnreadableRunsError, make_record
from fwlora.experiment.tracking.tracker import check_entries, check_row


class ToyTracker(Tracker):
    """Append every call to a file of JSON lines."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._append("config", dict(config))

    def log(self, values: Mapping[str, float | int]) -> None:
        self._append("row", check_row(values))

    def update_config(self, values: Mapping[str, Any]) -> None:
        self._append("config", check_entries(values))

    def set_summary(self, values: Mapping[str, Any]) -> None:
        self._append("summary", check_entries(values))

    def finish(self, exit_code: int = 0) -> None:
        self._append("exit_code", exit_code)

    def _append(self, kind: str, content: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, content]) + "\n")


class ToySource(RecordSource):
    """Read the files of :class:`ToyTracker`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, run_ids: Sequence[str]) -> list[RunRecord]:
        missing = [run_id for run_id in run_ids if not self._path(run_id).is_file()]
        if missing:
            raise UnreadableRunsError({run_id: f"no file {self._path(run_id)}" for run_id in missing})
        return [self._read(run_id) for run_id in run_ids]

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.jsonl"

    def _read(self, run_id: str) -> RunRecord:
        config, summary, rows, state = {}, {}, [], "running"
        for line in self._path(run_id).read_text(encoding="utf-8").splitlines():
            kind, content = json.loads(line)
            if kind == "row":
                rows.append(content)
            elif kind == "exit_code":
                state = "failed" if content else "finished"
            else:
                {"config": config, "summary": summary}[kind].update(content)
        return make_record(run_id, config, summary, rows, state, str(self._path(run_id)))


class ToySettings(TrackerSettings):
    """The node ``toy``."""

    environment: ClassVar[Mapping[str, str]] = {"folder": "TOY_FOLDER"}
    source_fields: ClassVar[tuple[str, ...]] = ("folder", "depth")

    folder: str
    depth: int = 1

    def open_tracker(self, *, run_id: str, config: Mapping[str, Any], directory: Path) -> Tracker:
        return ToyTracker(Path(self.folder) / f"{run_id}.jsonl", config)

    def open_source(self, *, results_dir: Path, source: str) -> RecordSource:
        return ToySource(Path(self.folder))


@contextmanager
def registered_toy() -> Iterator[None]:
    """Register the tracker ``toy`` inside the block."""
    register_tracker("toy", ToySettings)
    try:
        yield
    finally:
        unregister_tracker("toy")
        assert list(known_trackers()) == ["wandb"]
