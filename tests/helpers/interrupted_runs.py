"""Whole runs in this process that end at a chosen place, and what must not differ in those that are continued."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import src.train
from fwlora.experiment.resume.checkpointer import Checkpointer
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.stopping import Stopper
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.records import RowKey, row_key
from tests.helpers.memory_tracker import MemoryTracker

Place = tuple[str, int]


def list_methods(warmup_steps: int) -> dict[str, tuple[str, list[str]]]:
    """Every method that a stop has to respect: its name, the run file that is run and what is changed in it."""
    lora, adalora, proposed, control = (
        f"{method}-roberta-base-110M--CoLA-GLUE"
        for method in ("comparative-1", "comparative-2", "proposed", "comparative-3")
    )
    warmup = f"run.fw_lora.warmup_steps={warmup_steps}"
    return {
        "head alone": (lora, ["run.model.lora.enabled=false"]),
        "LoRA": (lora, []),
        "AdaLoRA": (adalora, []),
        "FW-LoRA, sketch": (proposed, [warmup]),
        "FW-LoRA, exact": (proposed, [warmup, "run.fw_lora.estimator=exact"]),
        "FW-LoRA, adapter": (proposed, [warmup, "run.fw_lora.estimator=adapter"]),
        "FW-LoRA, reallocation": (proposed, [warmup, "run.fw_lora.allocation=reallocate"]),
        "uniform shrinkage": (control, [warmup]),
    }


class Killed(BaseException):
    """A process that ends here, as SIGKILL would end it."""


class LastingTracker(MemoryTracker):
    """A tracker whose record outlives the process, as a server's does: attempts of a run share it."""

    def recorded_rows(self, attempts: Sequence[int]) -> Collection[RowKey]:
        return [row_key(row) for row in self.rows] if attempts else ()


@contextmanager
def lasting_trackers(patch: pytest.MonkeyPatch) -> Iterator[dict[str, LastingTracker]]:
    """Record the runs of this process in memory, by run id, over all their attempts."""
    trackers: dict[str, LastingTracker] = {}

    def start(settings: object, *, run_id: str, config: Mapping[str, Any], directory: Path) -> LastingTracker:
        tracker = trackers.setdefault(run_id, LastingTracker())
        if not config["attempt"]["chain"]:
            tracker.rows.clear()
        tracker.update_config(config)
        return tracker

    with patch.context() as own:
        own.setattr(src.train, "open_tracker", start)
        yield trackers


def end_at(patch: pytest.MonkeyPatch, place: Place, kind: str, stopper: Stopper) -> None:
    """Let the next run of this process end at a place.

    Args:
        patch: undoes it.
        place: ("step", n), ("epoch", n), ("evaluation", n of the run's evaluation batches), ("trial", n of a search),
            or ("save" | "summary", 0).
        kind: ``stop`` asks the stopper, ``kill`` ends the process there.
        stopper: of the run.
    """

    def reach(found: Place) -> None:
        if found == place:
            if kind == "kill":
                raise Killed
            stopper.requested = signal.SIGTERM

    batches = iter(range(1, 10_000))
    trials = iter(range(1, 10_000))
    real_step, real_epoch, real_evaluation = (
        getattr(Checkpointer, name) for name in ("after_step", "after_epoch", "during_evaluation")
    )

    def after_step(self: Checkpointer, state: Any) -> None:
        reach(("step", state.position.step))
        real_step(self, state)

    def after_epoch(self: Checkpointer, state: Any) -> None:
        reach(("epoch", state.position.epoch))
        real_epoch(self, state)

    def during_evaluation(self: Checkpointer, state: Any) -> None:
        reach(("evaluation", next(batches)))
        real_evaluation(self, state)

    def before(name: str, number: Callable[[], int]) -> Callable[..., Any]:
        real = getattr(src.train, name)

        def call(*arguments: Any, **options: Any) -> Any:
            reach((PLACES_BEFORE[name], number()))
            if PLACES_BEFORE[name] == "trial":
                stopper.check()
            return real(*arguments, **options)

        return call

    patch.setattr(Checkpointer, "after_step", after_step)
    patch.setattr(Checkpointer, "after_epoch", after_epoch)
    patch.setattr(Checkpointer, "during_evaluation", during_evaluation)
    patch.setattr(src.train, "trial_settings", before("trial_settings", lambda: next(trials)))
    patch.setattr(src.train, "save_model", before("save_model", lambda: 0))
    patch.setattr(src.train, "summarize_run", before("summarize_run", lambda: 0))


PLACES_BEFORE = {"trial_settings": "trial", "save_model": "save", "summarize_run": "summary"}


def digest_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_times(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary without what differs between two runs of one command."""
    return {name: value for name, value in summary.items() if name not in metrics.VARYING}


def find_results(settings: ProgramSettings, tracker: MemoryTracker) -> dict[str, Any]:
    """What two runs of the same settings share to the byte."""
    directory = Path(settings.results_dir) / settings.run.run_id
    return {
        "adapter": digest_folder(directory / "adapter"),
        "rows": tracker.rows,
        "summary": without_times(tracker.summary),
        "run": tracker.config["run"],
        "search": tracker.config.get("search"),
    }
