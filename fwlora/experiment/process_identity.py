"""Which process something belongs to, and whether that process still lives."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
_SAME_START_S = 1.0  # where the time of a process's start is computed from a clock that may be adjusted
_START_FIELD = 19  # of /proc/<pid>/stat, counted behind the name: clock ticks since boot


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, told apart from later ones that get its number.

    Attributes:
        place: where the number means this process: host, boot and, in containers, the namespace of process ids.
        pid: its number.
        started: when it started, in the system's own count since boot, which no change of the clock moves; in seconds
            since 1970 where there is none.
    """

    place: str
    pid: int
    started: float

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """Return the identity of the running process."""
        pid = os.getpid()
        return cls(_find_place(), pid, _find_start(pid))

    @classmethod
    def from_record(cls, record: Any) -> ProcessIdentity | None:
        """Read what :meth:`to_record` made; None for anything else."""
        with suppress(TypeError, KeyError, ValueError, OverflowError):
            return cls(str(record["place"]), int(record["pid"]), float(record["started"]))
        return None

    def to_record(self) -> Mapping[str, str | int | float]:
        """Return plain values for JSON."""
        return asdict(self)

    def lives(self) -> bool | None:
        """Return whether the process still runs; None where nothing here can tell: it is of another host."""
        if self.place != _find_place():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(_find_start(self.pid) - self.started) < _SAME_START_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.AccessDenied:
            return None
        except (psutil.Error, ValueError, OverflowError):
            return False


def _find_start(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        # The name may hold anything, parentheses too.
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_FIELD])
    return psutil.Process(pid).create_time()


def _find_place() -> str:
    boot, namespace = f"{psutil.boot_time():.0f}", ""
    with suppress(OSError):
        boot = _BOOT_ID.read_text().strip()
    with suppress(OSError):
        namespace = str(_NAMESPACE.readlink())
    return "/".join((platform.node(), boot, namespace))
