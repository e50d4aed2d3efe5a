"""Reading runs, from their files on this machine or from W&B's server, as the same records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fwlora.experiment.errors import UserError
from fwlora.experiment.tracking.records import RunRecord, RunState, UnreadableRunsError
from fwlora.experiment.tracking.wandb.files import read_files
from fwlora.experiment.tracking.wandb.raw_run import RawRun, Unavailable
from fwlora.experiment.tracking.wandb.session import end_session, explain, one_line, open_session

if TYPE_CHECKING:
    import wandb

API_TIMEOUT_S = 30
PARALLEL_READS = 8
STATES: dict[str, RunState] = {"finished": "finished", "failed": "failed", "running": "running"}  # others: crashed


def load_records(
    run_ids: Sequence[str],
    *,
    results_dir: Path,
    source: Literal["auto", "api", "files"],
    entity: str,
    project: str,
    timeout_s: int = API_TIMEOUT_S,
) -> list[RunRecord]:
    """Read runs as recorded, in the order asked for.

    Args:
        run_ids: ids the runs were started under.
        results_dir: holds ``<run_id>/wandb`` for runs of this machine, online ones too.
        source: ``files`` reads there, ``api`` asks W&B, ``auto`` asks W&B for what has not finished there.
        entity: W&B user or team.
        project: W&B project.
        timeout_s: bound of one W&B request.

    Returns:
        One record per id; its ``state`` says whether it has ended, and how.

    Raises:
        UnreadableRunsError: lists every run that was found nowhere, where it was looked for and the remedy.
    """
    if source not in ("auto", "api", "files"):
        raise UserError(f"`source` is {source!r}; it must be auto, api or files")
    wanted = list(dict.fromkeys(run_ids))
    found: dict[str, RunRecord] = {}
    reasons: dict[str, list[str]] = {run_id: [] for run_id in wanted}

    def collect(read: Callable[[str], RunRecord], missing: Sequence[str], threads: int) -> None:
        def read_one(run_id: str) -> None:
            try:
                found[run_id] = read(run_id)
            except Unavailable as reason:
                reasons[run_id].append(str(reason))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_one, missing))

    if source != "api":
        collect(lambda run_id: read_files(run_id, results_dir), wanted, threads=1)  # all work is Python's own
    missing = [run_id for run_id in wanted if run_id not in found or not found[run_id].finished]
    unreachable: list[str] = []
    if missing and source != "files":
        try:
            api = _connect(f"{entity}/{project}", timeout_s)
            collect(lambda run_id: _read_api(api, run_id, entity, project), missing, PARALLEL_READS)
        except Unavailable as reason:
            unreachable.append(f"W&B could not be asked: {reason}")
    unread = {run_id: "; ".join(reasons[run_id]) or "not read" for run_id in wanted if run_id not in found}
    if unread:
        raise UnreadableRunsError(unread, unreachable)
    return [found[run_id] for run_id in run_ids]


def _connect(place: str, timeout_s: int) -> wandb.Api:
    """A client whose key the server has accepted."""
    import wandb

    try:
        open_session("online")
        return wandb.Api(timeout=timeout_s)
    except Exception as error:
        reason = explain(error, place, timeout_s)
        end_session()  # otherwise the process waits at its end for the service, which still asks the server
        raise Unavailable(reason) from error


def _read_api(api: wandb.Api, run_id: str, entity: str, project: str) -> RunRecord:
    path = f"{entity}/{project}/{run_id}"
    try:
        run = api.run(path)
        rows = list(run.scan_history(use_cache=False))  # history() samples; a cached file may predate a resume
        state = STATES.get(run.state, "crashed")
        return RawRun(path, run.config, run.summary._json_dict, rows, state).to_record(run_id)
    except Exception as error:
        text = one_line(error)
        if "Could not find run" in text:
            text = f"W&B has no run {path} (are WANDB_ENTITY and WANDB_PROJECT right?)"
        raise Unavailable(text) from error
