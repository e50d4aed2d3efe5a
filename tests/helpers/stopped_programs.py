"""Whole programs on a tiny model that are stopped, killed or robbed from outside, and what is left of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fwlora.experiment.programs import WarmServer
from fwlora.experiment.tracking.records import RunRecord
from fwlora.experiment.tracking.wandb.reading import WandbSource
from tests.helpers.interrupted_runs import digest_folder, without_times
from tests.helpers.paths import REPOSITORY

OWN_PROGRAMS = ("src.main", "src.train", "wandb-core")


class TinyRun:
    """A run of ``src.main`` on a tiny model, started again and again in one results folder.

    Args:
        server: forks it.
        results: the results folder.
        run_id: a file of ``config/runs``.
        arguments: that every start has.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        server: WarmServer,
        results: Path,
        run_id: str,
        arguments: list[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._server, self.results, self.run_id = server, results, run_id
        self._arguments = [f"run={run_id}", "mode=full", f"results_dir={results}", *arguments]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.results / self.run_id

    def start(self, *more: str) -> Any:
        """Start it; close it by ``with``."""
        return self._server.start("src.main", [*self._arguments, *more], self._environment, REPOSITORY)

    def complete(self, *more: str) -> list[str]:
        """Start it and wait for its end, which is a good one; return what it printed."""
        with self.start(*more) as program:
            printed = program.stdout.read().splitlines()
        assert program.returncode == 0, printed
        return printed

    def record(self) -> RunRecord:
        """What W&B's files say of it."""
        return WandbSource(self.results, "files", "gengaru617-personal", "251106-test").load([self.run_id])[0]

    def found(self) -> dict[str, Any]:
        """What two runs of the same settings share to the byte."""
        record = self.record()
        adapter = digest_folder(self.directory / "adapter")
        del adapter["README.md"]  # it names the command, which names the folder
        return {
            "adapter": adapter,
            "history": list(record.history),
            "summary": without_times(record.summary),
            "state": record.state,
        }

    def attempts(self) -> list[dict[str, Any]]:
        """Their records."""
        paths = sorted((self.directory / "attempts").glob("*.json"))
        return [json.loads(path.read_text()) for path in paths]


def read_until(program: Any, text: str) -> list[str]:
    """Read what a program prints up to the line that holds a text."""
    printed = []
    for line in program.stdout:
        printed.append(line.rstrip("\n"))
        if text in line:
            return printed
    raise AssertionError(f"no {text!r} in {printed}")


def list_programs(folder: Path) -> Iterator[psutil.Process]:
    """The processes that work on runs below a folder, W&B's service among them."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            works = any(name in word for word in words for name in OWN_PROGRAMS)
            # A fork has the command line of the process that forked it.
            uses = any(str(folder) in file.path for file in process.open_files())
            if uses or (works and any(str(folder) in word for word in words)):
                yield process


def wait_for_none(folder: Path, patience_s: float = 12.0) -> list[psutil.Process]:
    """Wait until no process works below a folder; return those that still do after a while."""
    deadline = time.monotonic() + patience_s
    while (left := list(list_programs(folder))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
