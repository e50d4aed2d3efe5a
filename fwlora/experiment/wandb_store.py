"""Weights & Biases as the record of runs: writing one (online or offline) and reading many (API or local files).

The only module that imports ``wandb``, and only inside functions: importing it takes about a second.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from fwlora.experiment import metrics, tracking
from fwlora.experiment.errors import UserError
from fwlora.experiment.records import RunRecord, RunState, deduplicate_history

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 120.0
API_TIMEOUT_S = 30
TEARDOWN_TIMEOUT_S = 10.0
PARALLEL_READS = 8


@dataclass(frozen=True)
class WandbTarget:
    """Where a run is recorded.

    Attributes:
        entity: W&B user or team.
        project: W&B project.
        mode: ``online``, ``offline`` (local files, to be sent by ``wandb sync``) or ``disabled`` (no W&B at all).
        required: whether an online run that cannot reach W&B is an error instead of an offline run.
    """

    entity: str
    project: str
    mode: Literal["online", "offline", "disabled"]
    required: bool = False


def start_tracker(
    target: WandbTarget,
    *,
    run_id: str,
    config: Mapping[str, Any],
    directory: Path,
    announce: Callable[[str], None] = print,
    init_timeout_s: float = INIT_TIMEOUT_S,
    finish_timeout_s: float = FINISH_TIMEOUT_S,
) -> tracking.Tracker:
    """Start recording a run; an online run that cannot reach W&B goes on offline and says so in one line.

    Args:
        target: where to.
        run_id: id and name of the W&B run; an existing run of this id is resumed, its history appended to.
        config: first config entries.
        directory: gets a ``wandb`` folder.
        announce: receives the one line that says where the run is recorded.
        init_timeout_s: how long W&B may take to answer at the start.
        finish_timeout_s: how long the upload of what is left may take at the end.

    Raises:
        UserError: W&B is required and cannot be used, or not even offline files can be written.
        ValueError: ``config`` holds what cannot be recorded.
    """
    entries = tracking.check_entries(config)
    if target.mode == "disabled":
        return tracking.NullTracker()

    def start(mode: Literal["online", "offline"]) -> _WandbTracker:
        run = _init_run(target, mode, run_id, entries, directory, init_timeout_s, finish_timeout_s)
        return _WandbTracker(run, announce)

    cause = None
    if target.mode == "online":
        try:
            tracker = start("online")
        except Exception as error:
            cause = _explain(error, f"{target.entity}/{target.project}", init_timeout_s)
            if target.required:
                raise UserError(f"W&B is required (wandb.required=true) and cannot be used: {cause}") from error
        else:
            announce(f"W&B run: {tracker.url}")
            return tracker
    try:
        tracker = start("offline")
    except Exception as error:
        raise UserError(f"run `{run_id}` cannot be recorded in {directory}: {_one_line(error)}") from error
    reason = f"W&B: {cause}. The run goes on offline" if cause else "W&B offline"
    announce(f"{reason}, recorded in {tracker.folder}; send it later with: wandb sync {tracker.folder}")
    return tracker


def _init_run(
    target: WandbTarget,
    mode: Literal["online", "offline"],
    run_id: str,
    config: Mapping[str, Any],
    directory: Path,
    init_timeout_s: float,
    finish_timeout_s: float,
) -> wandb.Run:
    import wandb

    directory.mkdir(parents=True, exist_ok=True)
    _open_session(mode)
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        use_dot_wandb=False,
        init_timeout=init_timeout_s,
        finish_timeout=finish_timeout_s,
        finish_timeout_raises=True,
    )
    earlier_folders = _run_folders(directory, run_id)
    try:
        run = wandb.init(
            entity=target.entity,
            project=target.project,
            id=run_id,
            name=run_id,
            config=tracking.spell_non_finite(config),
            resume="allow",  # offline too: then a later sync appends to what the server has
            reinit="create_new",  # a run of the caller's own stays untouched
            dir=str(directory),
            mode=mode,
            settings=settings,
        )
    except Exception:
        end_session()  # otherwise the service holds the run id, and an offline run of that id is refused
        for folder in _run_folders(directory, run_id):
            if folder not in earlier_folders:
                shutil.rmtree(folder, ignore_errors=True)
        raise
    run.define_metric("*", step_metric=metrics.GLOBAL_STEP)
    return run


def end_session(timeout_s: float = TEARDOWN_TIMEOUT_S) -> None:
    """Stop W&B's service process, by force where it still waits for a server that does not answer."""
    import wandb

    def tear_down() -> None:
        with suppress(Exception):  # a service that was killed is reported as an error
            wandb.teardown()

    thread = threading.Thread(target=tear_down, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "wandb-core" in child.name():
                    child.kill()
        thread.join(timeout_s)


def _open_session(mode: Literal["online", "offline"]) -> None:
    """Load W&B's global settings, silent and with this mode whatever WANDB_MODE says, and find a key without asking."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True, mode=mode))
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise LookupError("no API key (set WANDB_API_KEY, or log in once with: wandb login)")


def _explain(error: Exception, place: str, timeout_s: float) -> str:
    """One line on why W&B could not be used."""
    import wandb

    server = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    text = _one_line(error)
    if "deadline exceeded" in text or "did not respond in time" in text or isinstance(error, TimeoutError):
        detail = re.search(r'while retrying: (?:Post "[^"]*": )?(.*)', text)
        return f"no usable answer from {server} within {timeout_s:g} s" + (f" ({detail[1]})" if detail else "")
    if "error 401" in text or "not logged in" in text:
        return f"{server} does not accept the API key"
    if not isinstance(error, OSError) and re.search(r"permission|not found|error 40[34]", text, re.IGNORECASE):
        return f"no access to `{place}` ({text}); WANDB_ENTITY and WANDB_PROJECT name another place"
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class _WandbTracker:
    """A W&B run behind the tracker protocol; no failure of it reaches the training loop."""

    def __init__(self, run: wandb.Run, announce: Callable[[str], None]) -> None:
        self._run: Any = run  # parts of it are untyped
        self._announce = announce
        self._failed = False
        self._finished = False
        self.url: str | None = None if run.offline else run.url
        self.folder = Path(run.dir).parent

    def log(self, values: Mapping[str, float | int]) -> None:
        self._guard(lambda: self._run.log(tracking.check_row(values)))

    def update_config(self, values: Mapping[str, Any]) -> None:
        self._guard(
            lambda: self._run.config.update(
                tracking.spell_non_finite(tracking.check_entries(values)), allow_val_change=True
            )
        )

    def set_summary(self, values: Mapping[str, Any]) -> None:
        self._guard(lambda: self._run.summary.update(tracking.spell_non_finite(tracking.check_entries(values))))

    def finish(self, exit_code: int = 0) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            remedy = f"wandb sync --include-online {self.folder}"
            self._announce(f"W&B: the upload is not complete; nothing is lost, send the rest with: {remedy}")
        except Exception as error:
            self._announce(f"W&B: the run's record ends early ({_one_line(error)}); what there is: {self.folder}")

    def _guard(self, record: Callable[[], object]) -> None:
        try:
            record()
        except Exception as error:
            if not self._failed:
                self._announce(f"W&B: values could not be recorded ({_one_line(error)}); the run goes on")
            self._failed = True


# Reading.


class _Unavailable(Exception):
    """A source cannot give a run; the message says why."""


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
        UserError: lists every run that was found nowhere, where it was looked for and the remedy.
    """
    if source not in ("auto", "api", "files"):
        raise UserError(f"`source` is {source!r}; it must be auto, api or files")
    wanted = list(dict.fromkeys(run_ids))
    found: dict[str, RunRecord] = {}
    reasons: dict[str, list[str]] = {run_id: [] for run_id in wanted}

    def collect(read: Callable[[str], RunRecord], missing: Sequence[str]) -> None:
        def read_one(run_id: str) -> None:
            try:
                found[run_id] = read(run_id)
            except _Unavailable as reason:
                reasons[run_id].append(str(reason))

        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            list(pool.map(read_one, missing))

    if source != "api":
        collect(lambda run_id: _read_files(run_id, results_dir), wanted)
    missing = [run_id for run_id in wanted if run_id not in found or not found[run_id].finished]
    unreachable: list[str] = []
    if missing and source != "files":
        try:
            api = _connect(f"{entity}/{project}", timeout_s)
            collect(lambda run_id: _read_api(api, run_id, entity, project), missing)
        except _Unavailable as reason:
            unreachable.append(f"W&B could not be asked: {reason}")
    problems = [f"`{run_id}`: {'; '.join(reasons[run_id]) or 'not read'}" for run_id in wanted if run_id not in found]
    if problems:
        raise UserError.collect("runs that cannot be read", problems + unreachable)
    return [found[run_id] for run_id in run_ids]


@dataclass
class _RawRun:
    """A run, or one attempt at it, as a source gives it."""

    source: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None: the end was not recorded

    def to_record(self, run_id: str) -> RunRecord:
        """Without W&B's own entries (leading underscore), NaN restored, each step once."""

        def clean(entries: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tracking.restore_non_finite(v) for name, v in entries.items() if not name.startswith("_")}

        history = deduplicate_history([clean(row) for row in self.rows])
        state: RunState = "crashed" if self.exit_code is None else "failed" if self.exit_code else "finished"
        return RunRecord(run_id, clean(self.config), clean(self.summary), history, state, self.source)

    def add(self, record: Mapping[str, Any]) -> None:
        """Apply one line of ``wandb leet inspect --json``."""
        match record:
            case {"type": "run", "run": {"config": change}} | {"type": "config", "config": change}:
                _apply(self.config, change)
            case {"type": "summary", "summary": change}:
                _apply(self.summary, change)
            case {"type": "history", "history": {"item": row}}:
                self.rows.append(row)
            case {"type": "exit", "exit": outcome}:
                self.exit_code = outcome.get("exit_code", 0)


def _apply(entries: dict[str, Any], change: Mapping[str, Any]) -> None:
    entries.update(change.get("update", {}))
    for removed in change.get("remove", []):
        entries.pop(removed["key"], None)


def _run_folders(directory: Path, run_id: str) -> list[Path]:
    """Folders that W&B made for a run, oldest first; a second one of the same second gets a suffix."""
    pattern = re.compile(rf"(?:offline-)?run-(\d{{8}}_\d{{6}})-{re.escape(run_id)}(?:-(\d+))?")
    dated = []
    for folder in directory.glob("wandb/*"):
        if (name := pattern.fullmatch(folder.name)) and (file := folder / f"run-{run_id}.wandb").is_file():
            dated.append((name[1], int(name[2] or 0), file.stat().st_mtime, folder))
    return [folder for *_, folder in sorted(dated)]


def _read_files(run_id: str, results_dir: Path) -> RunRecord:
    """The latest attempt that ended with exit code 0, otherwise the latest.

    Rows of the attempts before it count as far as it did not repeat them: one that resumed from a checkpoint does not
    hold the run's first steps. The history of an online run on the server is made up in the same way.
    """
    folders = _run_folders(results_dir / run_id, run_id)
    attempts = [attempt for folder in folders if (attempt := _read_folder(folder, run_id)).config or attempt.rows]
    if not attempts:
        raise _Unavailable(_explain_missing(run_id, results_dir, bool(folders)))
    complete = [index for index, attempt in enumerate(attempts) if attempt.exit_code == 0]
    chosen = complete[-1] if complete else len(attempts) - 1
    rows = [row for attempt in attempts[: chosen + 1] for row in attempt.rows]
    return replace(attempts[chosen], rows=rows).to_record(run_id)


def _read_folder(folder: Path, run_id: str) -> _RawRun:
    """Read a run folder with W&B's own inspector, which gives all intact records of a file that a crash cut off."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder / f"run-{run_id}.wandb")]
    environment = {**os.environ, "WANDB_MODE": "offline"}  # otherwise the inspector reports its use to the server
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout
    attempt = _RawRun(str(folder))
    for line in output.splitlines():
        attempt.add(json.loads(line))
    return attempt


def _explain_missing(run_id: str, results_dir: Path, unreadable: bool) -> str:
    folder = results_dir / run_id / "wandb"
    if unreadable:
        return f"no readable W&B file in {folder}"
    known = [path.parent.name for path in results_dir.glob("*/wandb")]
    close = ", ".join(difflib.get_close_matches(run_id, known, n=3))
    return f"no W&B files in {folder}" + (f" (there are: {close})" if close else "")


def _connect(place: str, timeout_s: int) -> wandb.Api:
    """A client whose key the server has accepted."""
    import wandb

    try:
        _open_session("online")
        return wandb.Api(timeout=timeout_s)
    except Exception as error:
        reason = _explain(error, place, timeout_s)
        end_session()  # otherwise the process waits at its end for the service, which still asks the server
        raise _Unavailable(reason) from error


def _read_api(api: wandb.Api, run_id: str, entity: str, project: str) -> RunRecord:
    path = f"{entity}/{project}/{run_id}"
    try:
        run = api.run(path)
        rows = list(run.scan_history(use_cache=False))  # history() samples; a cached file may predate a resume
        exit_code = 0 if run.state == "finished" else None
        return _RawRun(path, run.config, run.summary._json_dict, rows, exit_code).to_record(run_id)
    except Exception as error:
        text = _one_line(error)
        if "Could not find run" in text:
            text = f"W&B has no run {path} (are WANDB_ENTITY and WANDB_PROJECT right?)"
        raise _Unavailable(text) from error
