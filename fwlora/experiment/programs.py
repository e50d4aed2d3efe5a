"""How programs of ``src/`` are started: as new interpreters, or as forks of a process that has imported everything.

Importing takes most of the time from the shell to the first step of a short run. A :class:`WarmServer` imports once and
forks every program, which then is a process of its own, with the command line, streams, environment and exit code that
``python -u -m src.<program>`` would have. A program that was forked forks those that it starts itself.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Protocol, Self

from fwlora.experiment.paths import find_own_checkout
from fwlora.experiment.stopping import name_parent

PROGRAMS = ("src.main", "src.train")
# What runs import later than their first line; a test holds that nothing of weight is missing.
IMPORTED_LATER = (
    "datasets", "pyarrow.parquet", "sklearn.metrics", "pandas", "wandb.apis.public", "wandb.sdk.launch",
    "wandb.sdk.lib.gitlib", "scipy.io",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert", "transformers.models.roberta.tokenization_roberta",
    "peft.utils.transformers_weight_conversion", "fwlora.regularizer", "fwlora.adalora",
    "fwlora.experiment.tracking.wandb.writing",
)  # fmt: skip
# Read by libraries when they are imported: a fork with another value would not follow it.
THREADS_VARIABLE = "OMP_NUM_THREADS"
_preloaded = False


class DetachableFd(Protocol):
    """A file descriptor on its way to another process."""

    def detach(self) -> int:
        """Return the descriptor, once."""


class Program(Protocol):
    """A program that runs; ``subprocess.Popen`` is one.

    Attributes:
        pid: of its process.
        stdout: its output and errors.
        returncode: its exit code, -n where signal n ended it; None until it was waited for.
    """

    pid: int
    stdout: IO[str] | None
    returncode: int | Any

    def send_signal(self, sig: int) -> None:
        """Send a signal, if the program still runs."""

    def terminate(self) -> None:
        """Ask the program to end."""

    def wait(self) -> int:
        """Wait for the end; return the exit code."""

    def __enter__(self) -> Self:
        """Return the program; at the end of the block its output is closed and its end waited for."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the output and wait."""


def command_of(module: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that a program is started by."""
    return [sys.executable, "-u", "-m", module, *arguments]


def start_program(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    inherited: Sequence[int] = (),
) -> Program:
    """Start ``python -u -m <module>``, its output and errors in ``stdout``; from a fork, by forking.

    The program asks itself to stop when this process ends before it.

    Args:
        module: such as ``src.train``.
        arguments: of the program.
        environment: variables by name.
        folder: to start in; None for the current one.
        inherited: descriptors that the program keeps open.
    """
    variables = {**environment, **name_parent()}
    if _preloaded:
        return ForkedProgram(module, arguments, variables, folder)
    return subprocess.Popen(
        command_of(module, arguments),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=variables,
        pass_fds=inherited,
    )


class _Piped(ABC):
    """What forked programs have in common."""

    stdout: IO[str] | None
    returncode: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.wait()

    def terminate(self) -> None:
        """Ask the program to end."""
        self.send_signal(signal.SIGTERM)

    @abstractmethod
    def send_signal(self, sig: int) -> None:
        """Send a signal, if the program still runs."""

    @abstractmethod
    def wait(self) -> int:
        """Wait for the end; return the exit code."""


class ForkedProgram(_Piped):
    """A program as a fork of this process, which must not have computed anything yet."""

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None
    ) -> None:
        reading, writing = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _become(module, arguments, environment, folder, writing)
        os.close(writing)
        self.stdout: IO[str] | None = os.fdopen(reading, errors="replace")

    def send_signal(self, sig: int) -> None:
        """Send a signal, if the program still runs."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class WarmServer:
    """A process that has imported what runs import, and forks a program when it is asked to.

    Python's own fork server: it ends with this process, and its forks are no children of this process.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__ + "_preload"])

    @staticmethod
    def serves(repository: Path) -> bool:
        """Return whether programs of a checkout can be forked here: they have to be those that would be imported."""
        return "forkserver" in multiprocessing.get_all_start_methods() and repository.resolve() == find_own_checkout()

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> ServedProgram:
        """Fork a program; see :func:`start_program`."""
        reading, writing = os.pipe()
        try:
            process = self._context.Process(
                target=_become, args=(module, list(arguments), {**environment, **name_parent()}, folder, DupFd(writing))
            )
            process.start()
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return ServedProgram(process, reading)


class ServedProgram(_Piped):
    """A program that a :class:`WarmServer` forked."""

    def __init__(self, process: Any, reading: int) -> None:
        self._process = process
        self.pid: int = process.pid
        self.stdout: IO[str] | None = os.fdopen(reading, errors="replace")

    def send_signal(self, sig: int) -> None:
        """Send a signal, if the program still runs."""
        if self._process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        self._process.join()
        exit_code: int = self._process.exitcode
        self.returncode = exit_code
        return exit_code


def preload() -> None:
    """Import what runs import, in a process that forks them and computes nothing itself."""
    global _preloaded
    checkout = find_own_checkout()
    if checkout is None:
        return
    sys.path.insert(0, str(checkout))
    for name in (*PROGRAMS, *IMPORTED_LATER):
        with suppress(ImportError):
            importlib.import_module(name)
    for name in PROGRAMS:
        # A program runs under the name __main__, from its first line on.
        sys.modules.pop(name, None)
    gc.collect()
    gc.freeze()
    _preloaded = True


def _become(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None,
    output: int | DetachableFd,
) -> NoReturn:
    """Be a program, in a process that was forked for it, and end as it ends."""
    code = 1
    try:
        _take_streams(output if isinstance(output, int) else output.detach())
        threads = os.environ.get(THREADS_VARIABLE)
        os.environ.clear()
        os.environ.update(environment)
        if os.environ.get(THREADS_VARIABLE, threads) != threads:
            import torch

            torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))
        if folder is not None:
            os.chdir(folder)
        sys.path[0] = str(Path.cwd())
        sys.argv = [module, *arguments]
        sys.orig_argv = command_of(module, arguments)
        code = _run(module)
    finally:
        os._exit(code)


def _take_streams(output: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, place in (("stdout", 1), ("stderr", 2)):
        errors = "strict" if place == 1 else "backslashreplace"
        raw = open(place, "wb", buffering=0, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, errors=errors, write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _print_error(text: str) -> None:
    with suppress(OSError, ValueError):  # whoever reads may have gone away
        print(text.rstrip("\n"), file=sys.stderr)


def _run(module: str) -> int:
    """Run a module as the interpreter does, its exit functions included; return the exit code."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        if exit_.code is not None and not isinstance(exit_.code, int):
            _print_error(str(exit_.code))
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        _print_error(traceback.format_exc())
    except BaseException:
        code = 1
        _print_error(traceback.format_exc())
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code
