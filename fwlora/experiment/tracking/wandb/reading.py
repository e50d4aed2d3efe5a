"""Read runs from W&B's files on this machine or from its server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwlora.experiment.tracking.records import RunRecord, RunState, UnreadableRunsError
from fwlora.experiment.tracking.registry import SourceChoice
from fwlora.experiment.tracking.tracker import RecordSource
from fwlora.experiment.tracking.wandb.files import read_files
from fwlora.experiment.tracking.wandb.raw_run import RawRun, RunUnavailableError
from fwlora.experiment.tracking.wandb.session import end_session, explain, one_line, open_session

if TYPE_CHECKING:
    import wandb

API_TIMEOUT_S = 30
PARALLEL_READS = 8
NOT_FOUND = "Could not find run"
STATES: dict[str, RunState] = {"finished": "finished", "failed": "failed", "running": "running"}  # others: crashed


@dataclass(frozen=True)
class WandbSource(RecordSource):
    """Read runs in W&B's files on this machine, on its server, or both; the records are equal.

    Attributes:
        results_dir: holds ``<run_id>/wandb`` for runs of this machine, online ones too.
        source: ``files`` reads there, ``api`` the server, ``auto`` reads on the server what has not finished there.
        entity: W&B user or team.
        project: W&B project.
        timeout_s: of one request.
    """

    results_dir: Path
    source: SourceChoice
    entity: str
    project: str
    timeout_s: int = API_TIMEOUT_S

    def load(self, run_ids: Sequence[str]) -> list[RunRecord]:
        """Read runs, in the order of their ids; a record's ``state`` says whether and how the run ended.

        Raises:
            UnreadableRunsError: for every run that was found nowhere, the reason and the remedy.
        """
        reading = _Reading(list(dict.fromkeys(run_ids)))
        if self.source != "api":
            # One thread: the work is in Python.
            read = partial(read_files, results_dir=self.results_dir, project=self.project)
            reading.collect(read, reading.run_ids, threads=1)
        missing = [run_id for run_id in reading.run_ids if not reading.has_finished(run_id)]
        notes: list[str] = []
        if missing and self.source != "files":
            try:
                api = _connect(f"{self.entity}/{self.project}", self.timeout_s)
                reading.collect(lambda run_id: self._read_server(api, run_id), missing, PARALLEL_READS)
            except RunUnavailableError as reason:
                notes.append(f"W&B could not be asked: {reason}")
        unread = reading.explain_unread()
        if unread:
            raise UnreadableRunsError(unread, notes)
        return [reading.records[run_id] for run_id in run_ids]

    def _read_server(self, api: wandb.Api, run_id: str) -> RunRecord:
        path = f"{self.entity}/{self.project}/{run_id}"
        try:
            run = self._find_run(api, run_id)
            rows = list(run.scan_history(use_cache=False))  # history() samples; a cached file may predate a resume
            state = STATES.get(run.state, "crashed")
            return RawRun(path, run.config, run.summary._json_dict, rows, state, path).to_record(run_id)
        except Exception as error:
            text = one_line(error)
            if NOT_FOUND in text:
                text = f"W&B has no run {path} (are WANDB_ENTITY and WANDB_PROJECT right?)"
            raise RunUnavailableError(text) from error

    def _find_run(self, api: wandb.Api, run_id: str) -> Any:
        """Return the run of an id; without one the newest of that name, as programs name it that let W&B choose ids."""
        place = f"{self.entity}/{self.project}"
        try:
            return api.run(f"{place}/{run_id}")
        except Exception as error:
            if NOT_FOUND not in one_line(error):
                raise
            named = api.runs(place, filters={"display_name": run_id}, order="-created_at", per_page=1, lazy=False)
            with suppress(ValueError, IndexError):  # the project or the name is unknown
                return named[0]
            raise


class _Reading:
    """What was read so far, and why the rest was not.

    Args:
        run_ids: of the runs to read, each once.
    """

    def __init__(self, run_ids: list[str]) -> None:
        self.run_ids = run_ids
        self.records: dict[str, RunRecord] = {}
        self._reasons: dict[str, list[str]] = {run_id: [] for run_id in run_ids}

    def collect(self, read: Callable[[str], RunRecord], run_ids: Sequence[str], threads: int) -> None:
        """Read some runs with one reader; its record replaces an earlier one."""

        def read_one(run_id: str) -> None:
            try:
                self.records[run_id] = read(run_id)
            except RunUnavailableError as reason:
                self._reasons[run_id].append(str(reason))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_one, run_ids))

    def has_finished(self, run_id: str) -> bool:
        """Whether the run was read and had finished."""
        return run_id in self.records and self.records[run_id].finished

    def explain_unread(self) -> dict[str, str]:
        """Return the reasons of the runs that were not read, by run id."""
        unread = [run_id for run_id in self.run_ids if run_id not in self.records]
        return {run_id: "; ".join(self._reasons[run_id]) or "not read" for run_id in unread}


def _connect(place: str, timeout_s: int) -> wandb.Api:
    """Return a client whose key the server has accepted."""
    import wandb

    try:
        open_session("online")
        return wandb.Api(timeout=timeout_s)
    except Exception as error:
        reason = explain(error, place, timeout_s)
        end_session()  # otherwise the process waits at its end for the service, which still asks the server
        raise RunUnavailableError(reason) from error
