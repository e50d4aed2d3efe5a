"""Record a run in W&B, online or offline; no failure of W&B stops the training."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking import tracker as tracking
from fwlora.experiment.tracking.records import RowKey, find_row_keys
from fwlora.experiment.tracking.wandb.files import (
    find_run_folders,
    has_end,
    join_attempts,
    note_writer,
    read_attempts,
)
from fwlora.experiment.tracking.wandb.raw_run import RawRun
from fwlora.experiment.tracking.wandb.session import end_session, explain, find_upload_error, one_line, open_session

if TYPE_CHECKING:
    import wandb

    from fwlora.experiment.tracking.wandb.settings import WandbSettings

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 120.0
LOG_TIMEOUT_S = 5.0
_FLUSH_SETTING = "x_transaction_log_flush_interval"
FLUSH_INTERVAL_S = 1.0  # what a killed process loses; W&B's own 15 s can be all of a short run


def start_tracker(
    settings: WandbSettings,
    *,
    run_id: str,
    config: JsonMapping,
    directory: Path,
    init_timeout_s: float = INIT_TIMEOUT_S,
    finish_timeout_s: float = FINISH_TIMEOUT_S,
) -> tracking.Tracker:
    """Start to record a run; log where. An online run that cannot reach W&B is recorded offline, with a logged reason.

    Args:
        settings: the node ``wandb``.
        run_id: id and name of the W&B run; an existing run of this id is resumed, its history appended to.
        config: first config entries.
        directory: gets a ``wandb`` folder.
        init_timeout_s: longest wait for W&B's answer at the start.
        finish_timeout_s: longest wait at the end for the upload of the rest.

    Raises:
        UserError: W&B is required and cannot be used, or not even offline files can be written.
        ValueError: ``config`` holds what cannot be recorded.
    """
    entries = tracking.check_entries(config)
    if settings.mode == "disabled":
        return tracking.NullTracker()

    def start(mode: Literal["online", "offline"]) -> _WandbTracker:
        run = _init_run(settings, mode, run_id, entries, directory, init_timeout_s, finish_timeout_s)
        return _WandbTracker(run, directory)

    cause = None
    if settings.mode == "online":
        try:
            _warn_of_open_run(settings, run_id)
            tracker = start("online")
        except Exception as error:
            cause = explain(error, f"{settings.entity}/{settings.project}", init_timeout_s)
            if settings.required:
                raise UserError(f"W&B is required (wandb.required=true) and cannot be used: {cause}") from error
        else:
            logger.info("W&B run: %s", tracker.url)
            return tracker
    try:
        tracker = start("offline")
    except Exception as error:
        raise UserError(f"run `{run_id}` cannot be recorded in {directory}: {one_line(error)}") from error
    reason = f"W&B: {cause}. The run goes on offline" if cause else "W&B offline"
    logger.info("%s, recorded in %s; send it later with: wandb sync %s", reason, tracker.folder, tracker.folder)
    return tracker


def _warn_of_open_run(settings: WandbSettings, run_id: str) -> None:
    """Warn where W&B has a run of the id that has not ended: another job may be at it, or one that was killed was."""
    import wandb

    open_session("online")
    with suppress(Exception):  # there is none, or W&B cannot be asked, as starting the run will tell
        found = wandb.Api(timeout=ASK_TIMEOUT_S).run(f"{settings.entity}/{settings.project}/{run_id}")
        if found.state == "running":
            logger.warning(
                "W&B: run %s is open since %s. If another job is at it, end one of the two: their rows would be mixed. "
                "If that job was killed, this one continues its record",
                run_id,
                found.created_at,
            )


def _init_run(
    settings: WandbSettings,
    mode: Literal["online", "offline"],
    run_id: str,
    config: JsonMapping,
    directory: Path,
    init_timeout_s: float,
    finish_timeout_s: float,
) -> wandb.Run:
    import wandb

    directory.mkdir(parents=True, exist_ok=True)
    open_session(mode)
    # An experimental setting, which another version of the client may not have.
    flush: JsonObject = {_FLUSH_SETTING: FLUSH_INTERVAL_S} if _FLUSH_SETTING in wandb.Settings.model_fields else {}
    client_settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        save_code=False,
        disable_git=True,
        use_dot_wandb=False,
        init_timeout=init_timeout_s,
        finish_timeout=finish_timeout_s,
        finish_timeout_raises=True,
        **flush,
    )
    earlier_folders = find_run_folders(directory, run_id)
    try:
        run = wandb.init(
            entity=settings.entity,
            project=settings.project,
            id=run_id,
            name=run_id,
            config=tracking.spell_non_finite(config),
            resume="allow",  # offline too: then a later sync appends to what the server has
            reinit="create_new",  # a run of the caller's own stays untouched
            dir=str(directory),
            mode=mode,
            settings=client_settings,
        )
    except Exception:
        end_session()  # otherwise the service holds the run id, and an offline run of that id is refused
        for folder in find_run_folders(directory, run_id):
            if folder not in earlier_folders:
                shutil.rmtree(folder, ignore_errors=True)
        raise
    _drop_import_hooks()
    run.define_metric("*", step_metric=metrics.GLOBAL_STEP)
    return run


def _drop_import_hooks() -> None:
    """Keep the client out of later imports: it reports some of them, and an import fails with its service."""
    with suppress(ImportError, AttributeError):
        from wandb.sdk.lib.import_hooks import unregister_all_post_import_hooks

        unregister_all_post_import_hooks()


class _WandbTracker(tracking.Tracker):
    """A W&B run; a failure is logged once and raises nothing."""

    def __init__(self, run: wandb.Run, directory: Path) -> None:
        self._run: Any = run  # parts of it are untyped
        self._directory = directory
        self._problem: str | None = None
        self._finished = False
        self.url: str | None = None if run.offline else run.url
        self.folder = Path(run.dir).parent
        self._note_writer()

    def log(self, values: Mapping[str, float | int]) -> None:
        self._guard(lambda: self._run.log(tracking.check_row(values)))

    def update_config(self, values: JsonMapping) -> None:
        self._guard(
            lambda: self._run.config.update(
                tracking.spell_non_finite(tracking.check_entries(values)), allow_val_change=True
            )
        )

    def set_summary(self, values: JsonMapping) -> None:
        self._guard(lambda: self._run.summary.update(tracking.spell_non_finite(tracking.check_entries(values))))

    def recorded_rows(self, attempts: Sequence[int]) -> Collection[RowKey]:
        folders = [folder for folder in find_run_folders(self._directory, self._run.id) if folder != self.folder]
        read = [each for each in read_attempts(folders, self._run.id) if each.attempt[0] in attempts]
        if not read:
            return ()
        # The server may lack rows that were logged, and have older ones, of attempts that were given up.
        stored = self._read_server(min(each.started for each in read)) if self.url else None
        return find_row_keys((stored or join_attempts(read)).to_record(self._run.id).history)

    def problem(self) -> str | None:
        return None if self._problem is None else f"W&B: {self._problem}"

    def _read_server(self, since: float) -> RawRun | None:
        """Return the history that the server has from a time on, s since 1970; None where it cannot be asked."""
        import wandb

        with suppress(Exception):
            found = wandb.Api(timeout=ASK_TIMEOUT_S).run(self._run.path)
            rows = [row for row in found.scan_history(use_cache=False) if (row.get("_timestamp") or since) >= since]
            return RawRun(self.url or "", rows=rows)
        return None

    def finish(self, exit_code: int = 0) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            self._finish(exit_code)
        finally:
            self._note_writer(ended=True)

    def _finish(self, exit_code: int) -> None:
        log = Path(self._run.settings.log_internal)
        try:
            self._run.finish(exit_code=exit_code)
            unsent = find_upload_error(log)
        except TimeoutError:
            unsent = "no usable answer in time"
        except Exception as error:
            logger.warning("W&B: the run's record ends early (%s); what there is: %s", one_line(error), self.folder)
            self._problem = one_line(error)
            end_session()  # of a service that is gone, which the client would tell at the process's end
            return
        if not self._await_log():
            self._problem = self._problem or f"its end is not in {self.folder}"
        if unsent:
            logger.warning(
                "W&B: the upload is not complete (%s); nothing is lost, send the rest with: "
                "wandb sync --include-online %s",
                unsent,
                self.folder,
            )

    def _note_writer(self, ended: bool = False) -> None:
        # A reader of a folder without the note goes by the log's age.
        with suppress(OSError):
            note_writer(self.folder, ended)

    def _await_log(self) -> bool:
        """Wait for the end of the log, which W&B's client writes a moment after it reports the end of the run."""
        deadline = time.monotonic() + LOG_TIMEOUT_S
        with suppress(OSError):
            while not has_end(self.folder / f"run-{self._run.id}.wandb"):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)
            return True
        return False

    def _guard(self, record: Callable[[], object]) -> None:
        try:
            record()
        except Exception as error:
            if self._problem is None:
                logger.warning("W&B: values could not be recorded (%s); the run goes on", one_line(error))
                self._problem = one_line(error)
