"""The seam for launchers: how the runs of a study are started, on this machine or elsewhere."""

from __future__ import annotations

import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fwlora.experiment.errors import UserError
from fwlora.experiment.paths import CACHE_VARIABLE, machine_cache, make_writable
from fwlora.experiment.programs import Program, WarmServer, start_program
from fwlora.experiment.study.spec import PlannedRun

DEFAULT_LAUNCHER = "local"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: of ``src.main``; 0 of a run that did all it had to do.
    """

    exit_code: int


@dataclass(frozen=True)
class LaunchContext:
    """What every launcher is made from.

    Attributes:
        repository: the checkout that runs are started in.
        show_line: takes a run and a line that it printed, from any thread; optional for a launcher.
    """

    repository: Path
    show_line: Callable[[PlannedRun, str], None]


class Launcher(ABC):
    """Start runs; a context manager that stops at its end what still runs.

    Attributes:
        parallel: runs that may be under way at once.
    """

    parallel: int = 1

    @abstractmethod
    def submit(self, run: PlannedRun) -> Future[Outcome]:
        """Start ``python -u -m src.main`` with the run's arguments, in the checkout or a copy of it."""

    @abstractmethod
    def close(self) -> None:
        """Stop the runs that are still under way, and wait for their ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LocalLauncher(Launcher):
    """Start runs as processes of this machine, one after the other, this checkout's by forking.

    Args:
        context: where they start, and what takes their output.
    """

    def __init__(self, context: LaunchContext) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(self.parallel)
        self._lock = threading.Lock()
        self._children: set[Program] = set()
        self._server = WarmServer() if WarmServer.serves(context.repository) else None
        # Runs that are to be compared find what the first of them measured, its fastest precision among it.
        self._cache = None if make_writable(machine_cache()) else tempfile.TemporaryDirectory(prefix="fwlora-cache-")
        self._closed = False

    def submit(self, run: PlannedRun) -> Future[Outcome]:
        """Start a process; its output goes line by line to the context."""
        return self._pool.submit(self._run, run)

    def close(self) -> None:
        """Ask every process to end, as ``src.main`` does on SIGTERM, and wait."""
        with self._lock:
            self._closed = True
            for child in self._children:
                child.terminate()
        self._pool.shutdown(cancel_futures=True)
        if self._cache is not None:
            self._cache.cleanup()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **({} if self._cache is None else {CACHE_VARIABLE: self._cache.name})}

    def _run(self, run: PlannedRun) -> Outcome:
        start = start_program if self._server is None else self._server.start
        with self._lock:
            if self._closed:
                raise RuntimeError(f"run {run.run_id} was not started: the launcher is closed")
            child = start("src.main", run.arguments, self._environment(), self._context.repository)
            self._children.add(child)
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                self._context.show_line(run, line.rstrip("\n"))
        with self._lock:
            self._children.remove(child)
        return Outcome(child.wait())


_LAUNCHERS: dict[str, Callable[[LaunchContext], Launcher]] = {DEFAULT_LAUNCHER: LocalLauncher}


def register_launcher(name: str, make: Callable[[LaunchContext], Launcher]) -> None:
    """Add a launcher.

    Args:
        name: the value of ``--on``.
        make: the launcher's class, or a function that makes one.

    Raises:
        ValueError: another launcher has the name.
    """
    if _LAUNCHERS.get(name, make) is not make:
        raise ValueError(f"`name` {name!r} is taken by {_LAUNCHERS[name]!r}; choose another")
    _LAUNCHERS[name] = make


def unregister_launcher(name: str) -> None:
    """Remove a launcher, if it is registered."""
    _LAUNCHERS.pop(name, None)


def open_launcher(name: str, context: LaunchContext) -> Launcher:
    """Make the launcher of a name.

    Raises:
        UserError: the name is not registered.
    """
    if name not in _LAUNCHERS:
        raise UserError(f"launcher {name!r} is unknown; known: {', '.join(_LAUNCHERS)}")
    return _LAUNCHERS[name](context)
