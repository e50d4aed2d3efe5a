"""One holder per run: a lock that names its holder and is freed by the holder's end, however it comes.

The lock is the operating system's (``flock``), so that it needs no cleaning up: it ends with the last process that has
the file open. On Linux it holds between hosts on NFS as well, as long as the server grants locks. On a file system
without locks the holder's own record decides: a process of this host that lives, or one of another host that nothing
here can ask, holds the run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fwlora.experiment.errors import EXIT_HELD, UserError, describe_unwritable
from fwlora.experiment.paths import ATTEMPTS, find_run_folder
from fwlora.experiment.process_identity import ProcessIdentity
from fwlora.experiment.resume.attempts import now_in_utc
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.settings.schema import ProgramSettings

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# A child that was started by the holder finds the open lock under this variable.
LOCK_VARIABLE = "FWLORA_RUN_LOCK"
LOCK = "lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class HeldRunError(UserError):
    """A run that another process is at."""

    exit_code = EXIT_HELD


@dataclass(frozen=True)
class Holder:
    """Who holds a run.

    Attributes:
        host: its machine's name.
        started: when it took the run, ISO 8601 in UTC.
        process: which process it is.
    """

    host: str
    started: str
    process: ProcessIdentity

    @classmethod
    def of_this_process(cls) -> Holder:
        """Return the running process, which takes a run now."""
        return cls(platform.node(), now_in_utc(), ProcessIdentity.of_this_process())

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """Read the record in a lock's file; None where there is none."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(file.read_text(encoding="utf-8"))
            process = ProcessIdentity.from_record(record["process"])
            return cls(str(record["host"]), str(record["started"]), process) if process else None
        return None

    def to_bytes(self) -> bytes:
        """Return the record as it is written."""
        record = {"host": self.host, "started": self.started, "process": dict(self.process.to_record())}
        return (json.dumps(record) + "\n").encode()


class RunLock:
    """The lock of a run; taken when it is made, freed by :meth:`release` or the end of all processes that have it.

    Args:
        file: of the lock; its folder is made.
        run_id: for messages.
        descriptor: of the file as a parent has locked and passed it on, which then stays locked when the parent ends.

    Attributes:
        descriptor: of the file, for children to inherit.

    Raises:
        HeldRunError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, run_id: str, descriptor: int | None = None) -> None:
        self._file = file
        if descriptor is not None:
            self.descriptor = descriptor
            self._write_holder()
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._take(run_id)
            self._write_holder()
        except BaseException:
            os.close(self.descriptor)
            raise

    def _take(self, run_id: str) -> None:
        holder = Holder.read(self._file)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lives = holder.process.lives() if holder else False
            if error.errno in _HELD or lives:
                raise HeldRunError(_describe(run_id, holder)) from None
            if lives is None:
                told = f"{_describe(run_id, holder)}. If that process is gone, remove {self._file}"
                raise HeldRunError(told) from None
            logger.warning(
                "warning: %s is on a file system without locks (%s); two starts within a second may both go on",
                self._file.parent,
                error.strerror,
            )

    def _write_holder(self) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, Holder.of_this_process().to_bytes(), 0)

    def for_child(self) -> dict[str, str]:
        """Return the variable from which a child that inherits the descriptor takes the lock."""
        return {LOCK_VARIABLE: str(self.descriptor)}

    def release(self) -> None:
        """Free the run, unless a child that was started with the lock still has it."""
        with suppress(OSError):
            holder = Holder.read(self._file)
            if holder is not None and holder.process == ProcessIdentity.of_this_process():
                os.ftruncate(self.descriptor, 0)
        with suppress(OSError):
            os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def hold_run(settings: ProgramSettings) -> AbstractContextManager[RunLock | None]:
    """Take a run for the block, if its mode is recorded and this is the first of its processes.

    Raises:
        HeldRunError: another process has it.
        UserError: the folder cannot be written.
    """
    if not get_mode(settings.mode).is_recorded or int(os.environ.get("RANK", "0")):
        return nullcontext()
    file = find_run_folder(settings.results_dir, settings.run.run_id) / ATTEMPTS / LOCK
    try:
        return RunLock(file, settings.run.run_id, _find_passed_on(file))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise describe_unwritable(file.parent, error) from None


def _find_passed_on(file: Path) -> int | None:
    """Return the descriptor that the process above passed on for this file; None where it did not."""
    with suppress(KeyError, ValueError, OSError):
        descriptor = int(os.environ.pop(LOCK_VARIABLE))
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
    return None


def _describe(run_id: str, holder: Holder | None) -> str:
    who = "another process"
    if holder is not None:
        who = f"process {holder.process.pid} on {holder.host}, since {holder.started}"
    return f"run {run_id} is being made by {who}; wait for its end, or end it: the same command then continues the run"
