"""Runs as tests of the W&B store write, break, send and read them, by a client that knows nothing of this machine."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.tracking.records import RunRecord
from fwlora.experiment.tracking.tracker import Tracker, spell_non_finite
from fwlora.experiment.tracking.wandb import WandbSettings
from fwlora.experiment.tracking.wandb.reading import WandbSource
from fwlora.experiment.tracking.wandb.session import end_session
from fwlora.experiment.tracking.wandb.writing import start_tracker
from tests.helpers.paths import REPOSITORY
from tests.helpers.wandb_server import API_KEY, ENTITY, WandbServer

TARGET = WandbSettings(entity=ENTITY, project="project", mode="online")
OFFLINE = TARGET.model_copy(update={"mode": "offline"})
CONFIG = {"run": {"run_id": "a", "training": {"learning_rate": 2e-4, "betas": [0.9, 0.999]}}}
SUMMARY = {
    "completed": True,
    "final_accuracy": 0.5,
    "best_accuracy": math.inf,
    "module_ranks": list(range(72)),
    "module_importances": [None, 0.25],
    "eval_predictions": {"encoding": "bits", "count": 3, "data": "oA==", "nested": {"a.b": 1}},
}

Outage = Literal["stopped", "hang"] | int


@contextmanager
def isolated_client(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Neither the machine's W&B login and settings nor an earlier test's session reach what runs inside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home.mkdir(exist_ok=True)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        end_session(3.0)
        yield patch
        end_session(3.0)


@contextmanager
def serving(patch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the client finds, and whose key it has."""
    with WandbServer() as running:
        patch.setenv("WANDB_BASE_URL", running.url)
        patch.setenv("WANDB_API_KEY", API_KEY)
        yield running


def break_server(server: WandbServer, outage: Outage) -> None:
    """Stop it, or let it answer a status or nothing."""
    if outage == "stopped":
        server.stop()
    else:
        server.fault = outage


def repair_server(server: WandbServer, outage: Outage) -> None:
    """Undo :func:`break_server`."""
    server.fault = None
    if outage == "stopped":
        server.restart()


class _LineHandler(logging.Handler):
    """Appends what is logged to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def collect_log_lines(lines: list[str] | None) -> None:
    """Append what tracking logs from now on to a list, and to no earlier one; None collects nothing."""
    logger = logging.getLogger("fwlora.experiment.tracking")
    logger.setLevel(logging.INFO)
    logger.handlers = [] if lines is None else [_LineHandler(lines)]


def start(
    settings: WandbSettings,
    results: Path,
    run_id: str = "a",
    lines: list[str] | None = None,
    patience_s: float = 30.0,
    config: dict | None = None,
) -> Tracker:
    collect_log_lines(lines)
    return start_tracker(
        settings,
        run_id=run_id,
        config=CONFIG if config is None else config,
        directory=results / run_id,
        init_timeout_s=patience_s,
        finish_timeout_s=patience_s,
    )


def rows(steps: Sequence[int], scale: float = 1.0) -> list[dict[str, float]]:
    """Rows whose loss tells by which attempt they were logged; step 3 diverged."""
    return [{"global_step": step, "train_loss": math.nan if step == 3 else scale / step} for step in steps]


def write(tracker: Tracker, steps: Sequence[int], scale: float = 1.0, exit_code: int = 0) -> None:
    for row in rows(steps, scale):
        tracker.log(row)
    tracker.update_config({"resolved": {"task": "sst2", "scale": scale, "unknown": math.nan}})
    tracker.set_summary(SUMMARY)
    tracker.finish(exit_code)


def load(results: Path, source: str, *run_ids: str, timeout_s: int = 30) -> list[RunRecord]:
    return WandbSource(results, source, TARGET.entity, TARGET.project, timeout_s).load(run_ids or ["a"])


def content(record: RunRecord) -> dict[str, object]:
    """All of a record but where it was read, comparable: NaN by its name."""
    return {name: spell_non_finite(value) for name, value in vars(record).items() if name not in ("source", "place")}


def as_json(*records: RunRecord) -> bytes:
    """All of some records but where they were read, each byte that evaluation could see."""
    return json.dumps([content(record) for record in records]).encode()


def expected(*parts: list[dict[str, float]]) -> list[dict[str, object]]:
    return spell_non_finite([row for part in parts for row in part])


def run_folders(results: Path, run_id: str = "a") -> list[Path]:
    """The folders of a run's attempts, oldest first."""
    return sorted(
        (path for path in (results / run_id).glob("wandb/*run-2*") if not path.is_symlink()),
        key=lambda path: (path.name.removeprefix("offline-").split("-")[1], path.name),
    )


def sync(*arguments: object) -> None:
    """Run ``wandb sync``, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr


def follow_advice(line: str) -> None:
    """Send a run by the command at the end of an announced line."""
    sync(*line.partition("wandb sync ")[2].split())


def kill_half_way(mode: str, results: Path, steps: Sequence[int], run_id: str = "a") -> None:
    """A process of its own logs these steps, and is killed as soon as they are in its file."""
    program = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(program), mode, str(results), run_id, ",".join(map(str, steps))]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(200):
        time.sleep(0.1)
        try:
            (record,) = load(results, "files", run_id)
        except UserError:
            continue
        if len(record.history) == len(steps):
            break
    process.kill()
    process.wait()
