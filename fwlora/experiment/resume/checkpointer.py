"""When a training is saved, and what is saved beside its state: the history that it has logged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.state import TrainState
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.resume.encoding import load_state, save_state
from fwlora.experiment.resume.store import Checkpoint, CheckpointStore
from fwlora.experiment.stopping import Stopper
from fwlora.experiment.tracking.records import RowKey, row_key

EVERY_S = 30.0
# Where writing is slow, checkpoints take no more of the time than this.
LARGEST_SHARE = 0.005
_ROWS, _RUN = "rows.jsonl", "run.json"

Row = Mapping[str, float | int]


class History:
    """The rows that a run has logged, over all attempts that continue one another, each logged once.

    Args:
        log: takes a row.
        recorded: keys of the rows that earlier attempts have logged; they are not logged again.
    """

    def __init__(self, log: Callable[[Row], None], recorded: Collection[RowKey] = ()) -> None:
        self._log, self._recorded = log, frozenset(recorded)
        self._lines: list[str] = []

    def add(self, row: Row) -> None:
        """Log a row, unless it is recorded already."""
        self._lines.append(json.dumps(dict(row)))
        if row_key(row) not in self._recorded:
            self._log(row)

    def save(self, folder: Path) -> None:
        """Write all rows into a checkpoint's folder."""
        (folder / _ROWS).write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the rows of a checkpoint, and log those that are not recorded."""
        for line in (folder / _ROWS).read_text(encoding="utf-8").splitlines():
            self.add(json.loads(line))


class Checkpointer(TrainingWatch):
    """Save a training by time, at every epoch and when it is to stop; all processes at the same step.

    Args:
        store: that takes the checkpoints.
        history: rows that are logged so far.
        run: settings of the training, searched values included.
        processes: of the training.
        stopper: of this process.
        every_s: seconds from one checkpoint to the next; more where writing one takes over :data:`LARGEST_SHARE`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        history: History,
        run: JsonMapping,
        processes: Processes,
        stopper: Stopper,
        every_s: float = EVERY_S,
    ) -> None:
        self._store, self._history, self._run = store, history, run
        self._processes, self._stopper, self._every_s = processes, stopper, every_s
        self._due = time.monotonic() + every_s

    def after_step(self, state: TrainState) -> None:
        """Save where it is time, and stop where that was asked for."""
        stop, due = self._agree(self._stopper.requested is not None, time.monotonic() >= self._due)
        if stop or due:
            self.save(state)
        if stop:
            self._stopper.stop()

    def after_epoch(self, state: TrainState) -> None:
        """Save, and stop where that was asked for."""
        self.save(state)
        if self._agree(self._stopper.requested is not None, False)[0]:
            self._stopper.stop()

    def during_evaluation(self, state: TrainState) -> None:
        """Stop where that was asked for; the evaluation is made again."""
        if self._processes.count == 1 and self._stopper.requested is not None:
            self.save(state)
            self._stopper.stop()

    def save(self, state: TrainState) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written; the earlier ones are left.
        """
        started = time.monotonic()
        content, index = state.state_dict(), self._processes.index
        partial = self._share_folder()
        save_state(content, partial / f"state-{index}")
        self._wait()
        if index == 0:
            self._history.save(partial)
            (partial / _RUN).write_text(json.dumps(self._run), encoding="utf-8")
            self._store.commit(partial, state.position.step)
        self._wait()
        state.meter.skip_time()
        ended = time.monotonic()
        self._due = ended + max(self._every_s, (ended - started) / LARGEST_SHARE)

    def _agree(self, *flags: bool) -> list[bool]:
        """Return which flags any process has set."""
        if self._processes.count == 1:
            return list(flags)
        counts = self._processes.sum(torch.tensor(flags, dtype=torch.float32, device=self._processes.device))
        return [bool(count) for count in counts.tolist()]

    def _share_folder(self) -> Path:
        if self._processes.count == 1:
            return self._store.open_partial()
        found: list[Any] = [str(self._store.open_partial()) if self._processes.index == 0 else None]
        dist.broadcast_object_list(found)
        return Path(found[0])

    def _wait(self) -> None:
        if self._processes.count > 1:
            dist.barrier()


def load_settings(checkpoint: Checkpoint) -> JsonMapping:
    """Return the settings of the training that a checkpoint is of.

    Raises:
        ValueError: a checkpoint of another form.
        OSError: a file that cannot be read.
    """
    found: JsonMapping = json.loads((checkpoint.folder / _RUN).read_text(encoding="utf-8"))
    return found


def load_checkpoint(checkpoint: Checkpoint, processes: Processes) -> Any:
    """Return the state of this process in a checkpoint, for ``resume_from`` of a training.

    Raises:
        ValueError: a checkpoint of another form.
        OSError: a file that cannot be read.
    """
    return load_state(checkpoint.folder / f"state-{processes.index}")
