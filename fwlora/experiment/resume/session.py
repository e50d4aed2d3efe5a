"""One attempt at a run, from taking the run to its end: lock, record of the attempt, checkpoints, outcome."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.errors import EXIT_UNRECORDED, UserError
from fwlora.experiment.files import remove_partials
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.modeling.pretrained import find_weight_files
from fwlora.experiment.paths import ADAPTER, ATTEMPTS, CHECKPOINTS, find_run_folder
from fwlora.experiment.resume.attempts import Attempt, AttemptLog, OutcomeWord
from fwlora.experiment.resume.checkpointer import Checkpointer, History, load_checkpoint, load_settings
from fwlora.experiment.resume.identity import describe_identity, find_differences
from fwlora.experiment.resume.store import TRIALS, Checkpoint, CheckpointStore
from fwlora.experiment.resume.trials import TrialLog
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.settings.schema import ProgramSettings, RunSettings
from fwlora.experiment.stopping import Stopper, StopRequested
from fwlora.experiment.tracking import Tracker
from fwlora.experiment.tracking.facts import RunFacts

logger = logging.getLogger(__name__)


class UnrecordedRunError(UserError):
    """A run whose record is not whole."""

    exit_code = EXIT_UNRECORDED


@dataclass
class RunSession:
    """One attempt at a run.

    Attributes:
        directory: of the run.
        attempt: the record of this attempt, or that of the finished one; None in a mode that is not recorded.
        processes: of the training.
        stopper: of this process.
        store: of checkpoints; None in a mode that keeps none.
        checkpoint: that the training continues from; None where it starts.
        starts_anew: whether the settings say so.
    """

    directory: Path
    attempt: Attempt | None
    processes: Processes
    stopper: Stopper
    store: CheckpointStore | None = None
    checkpoint: Checkpoint | None = None
    starts_anew: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the run was finished before, so that nothing is left to do."""
        return self.attempt is not None and self.attempt.outcome == "finished"

    @property
    def adapter_folder(self) -> Path | None:
        """Where the trained model is saved; None in a mode that keeps none."""
        return None if self.store is None else self.directory / ADAPTER

    @property
    def trials(self) -> TrialLog:
        """The finished trials of the run's search; processes read them, and the first one writes."""
        return TrialLog(None if self.store is None else self.store.folder / TRIALS, writes=self.processes.index == 0)

    def as_record(self) -> JsonObject:
        """Return the attempt as the tracker's config holds it."""
        return {} if self.attempt is None else {"attempt": self.attempt.for_record()}

    def open_history(self, tracker: Tracker) -> History:
        """Return what takes the training's rows, and passes on to the tracker those that it lacks."""
        return History(tracker.log, tracker.recorded_rows(self.attempt.chain) if self.attempt else ())

    def open_watch(self, history: History, run: RunSettings) -> TrainingWatch:
        """Return what saves the training of these settings, with the rows that it has logged."""
        if self.store is None:
            return TrainingWatch()
        return Checkpointer(self.store, history, run.model_dump(mode="json"), self.processes, self.stopper)

    def load(self, history: History, run: RunSettings) -> Any:
        """Return the state to continue from, its rows passed to the history; None where the training starts.

        Raises:
            UserError: the state is of a training of other settings, as a search found others.
        """
        if self.checkpoint is None:
            return None
        differences, _ = find_differences({"run": load_settings(self.checkpoint)}, {"run": run.model_dump(mode="json")})
        if differences:
            raise UserError.collect(
                f"{self.checkpoint.folder} is of a training of other settings",
                [*differences, "its search was made again and found others; resume=never starts anew"],
            )
        history.load(self.checkpoint.folder)
        return load_checkpoint(self.checkpoint, self.processes)

    def deferring_stops(self) -> AbstractContextManager[None]:
        """Only note requests to stop in the block, where checkpoints are written and the training watches for them."""
        return nullcontext() if self.store is None else self.stopper.deferred()

    @contextmanager
    def recording(self, tracker: Tracker) -> Iterator[None]:
        """End the tracker's record and the attempt's as the block ends.

        Raises:
            UnrecordedRunError: the block did all it had to do, but the tracker's record is not whole.
        """
        try:
            yield
        except StopRequested as stop:
            self._end("stopped", str(stop))
            tracker.finish(stop.exit_code)
            if self.store is not None:
                how = "resume=auto" if self.starts_anew else "the same command"
                logger.info(f"{how} continues the run")
            raise
        except BaseException as error:
            self._end("failed", " ".join(str(error).split())[:500] or type(error).__name__)
            tracker.finish(1)
            raise
        with self.stopper.finishing():
            tracker.finish(0)
            problem = tracker.problem()
            if problem is not None:
                self._end("failed", f"the record is not whole: {problem}")
                raise UnrecordedRunError(
                    f"the run is trained, but its record is not whole ({problem}); the same command completes it"
                )
            self._end("finished")
            if self.store is not None and self.processes.index == 0:
                self.store.clear()

    def _end(self, outcome: OutcomeWord, reason: str | None = None) -> None:
        """Record how the attempt ended; of one that failed as far as that can be written."""
        if self.attempt is None or self.processes.index:
            return
        with suppress(OSError) if outcome != "finished" else nullcontext():
            AttemptLog(self.directory / ATTEMPTS).end(self.attempt, outcome, reason)


def open_session(settings: ProgramSettings, facts: RunFacts, processes: Processes, stopper: Stopper) -> RunSession:
    """Start an attempt at a run that this process holds, or find that the run is finished.

    Args:
        settings: of the run and the program.
        facts: what the program found out about the run.
        processes: of the training; the first one decides.
        stopper: of this process.

    Raises:
        UserError: what there is to continue from is of another run; every difference is listed.
    """
    mode, directory = get_mode(settings.mode), find_run_folder(settings.results_dir, settings.run.run_id)
    if not mode.is_recorded:
        return RunSession(directory, None, processes, stopper)
    store = CheckpointStore(directory / CHECKPOINTS) if mode.keeps_model else None
    decided: list[Any] = [None]
    if processes.index == 0:
        weights: list[Path] = []
        with suppress(Exception):  # a model of the Hub that is not here yet
            weights = find_weight_files(settings.run.model.pretrained_id, settings.run.model.revision)
        threads = torch.get_num_threads()
        device = processes.device.type
        identity = describe_identity(
            settings, facts, weights, processes=processes.count, threads=threads, device=device
        )
        decided = [_start_attempt(directory, settings, identity, store)]
    if processes.count > 1:
        dist.broadcast_object_list(decided)
    attempt, checkpoint = decided[0]
    return RunSession(directory, attempt, processes, stopper, store, checkpoint, settings.resume == "never")


def _start_attempt(
    directory: Path, settings: ProgramSettings, identity: JsonMapping, store: CheckpointStore | None
) -> tuple[Attempt, Checkpoint | None]:
    """Decide what an attempt continues, and record its start."""
    log, mode = AttemptLog(directory / ATTEMPTS), settings.mode
    for folder in (directory, log.folder):
        remove_partials(folder)
    earlier = [attempt for attempt in log.read() if attempt.mode == mode]
    if store is not None and not store.is_empty and not earlier and settings.resume != "never":
        raise UserError(
            f"{store.folder} holds a checkpoint, but no record in {log.folder} says of which attempt; restore these "
            "records, or set resume=never to start anew"
        )
    if store is None or not earlier or settings.resume == "never":
        if store is not None:
            store.clear()
        return log.start(mode, identity, [], 0), None
    last = earlier[-1]
    is_finished = last.outcome == "finished" and (directory / ADAPTER).is_dir()
    differences, environment = find_differences(last.identity, identity)
    if differences and (is_finished or not store.is_empty):
        state = "is finished" if is_finished else "has a checkpoint"
        remedy = "set these as they were, or resume=never to start anew, which replaces what is there"
        raise UserError.collect(f"{directory} {state}, and differs from what is asked for", [*differences, remedy])
    if is_finished:
        store.clear()
        return last, None
    continues = not differences and last.outcome != "finished"
    if not continues:
        store.clear()
        return log.start(mode, identity, [], 0), None
    checkpoint = next(store.read_newest(), None)
    if checkpoint is None and store.has_checkpoints:
        logger.warning("warning: no checkpoint in %s is intact; the training starts again", store.folder)
    attempt = log.start(mode, identity, [*last.chain, last.number], checkpoint.step if checkpoint else 0)
    logger.info(f"attempt {attempt.number}: continues attempt {last.number} from step {attempt.resumed_at}")
    if environment:
        logger.warning("warning: not to the byte, since the environment differs: %s", "; ".join(environment))
    return attempt, checkpoint
