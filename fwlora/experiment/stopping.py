"""Requests to stop: a run ends between two optimizer steps, with a checkpoint, and not later than a fixed time.

The first of :data:`SIGNALS`, or the end of the process that started this one, is a request. Where nothing would be lost
it raises :class:`StopRequested` at once; inside :meth:`Stopper.deferred` it is noted, and the code there asks
:meth:`Stopper.check` at the places where it can stop. A second signal ends the process at once, and so does the end of
:data:`PATIENCE_S`, whatever the process is doing but :meth:`Stopper.finishing`: then what was saved before counts.
Signals within :data:`SAME_S` are one request, as a scheduler sends them to a program and its parent, which passes them
on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from fwlora.experiment.process_identity import ProcessIdentity

# Those that this system has: Windows lacks two of them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
PATIENCE_S = 9.0
SAME_S = 1.0
PARENT_POLL_S = 0.5
# Names the process that this one must not outlive.
PARENT_VARIABLE = "FWLORA_PARENT"


class StopRequested(BaseException):
    """The process was asked to stop; no ``except Exception`` takes it for an error.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + n, as shells report a process that signal n ended."""
        return 128 + self.number


class Stopper:
    """The requests to stop of one process.

    Args:
        patience_s: seconds after which the process ends, whatever it is doing.

    Attributes:
        requested: the signal of a request, None before one.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self.requested: int | None = None
        self._requested_at = 0.0
        self._deferrals = 0
        self._finishing = False

    def install(self) -> None:
        """Take the signals, of those that this process does not ignore, and watch the process above if one is named.

        Call it once, in the main thread.
        """
        taken = []
        for number in SIGNALS:
            # A program that was started by nohup, or in the background, ignores some, and is to go on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)
                taken.append(number)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Written to when a signal comes in, also while the main thread is in code that runs no handler.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._limit_time, args=(reading, frozenset(taken)), daemon=True).start()
        watch_parent()

    def check(self) -> None:
        """Stop here, if that was asked for.

        Raises:
            StopRequested: it was.
        """
        if self.requested is not None:
            raise StopRequested(self.requested)

    def stop(self) -> NoReturn:
        """Stop here, as another process of the training was asked to, if not this one."""
        raise StopRequested(self.requested or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note requests in the block; :meth:`check` raises them."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Take requests no more in the block, which ends the run: only a second one ends the process."""
        self._finishing = True
        with self.deferred():
            yield

    def _take(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested is not None:
            if now - self._requested_at > SAME_S:
                os._exit(128 + number)
            return
        self.requested, self._requested_at = number, now
        if not self._deferrals:
            raise StopRequested(number)

    def _limit_time(self, reading: int, taken: frozenset[int]) -> None:
        while (number := os.read(reading, 1)[0]) not in taken:
            pass
        time.sleep(self._patience_s)
        if self._finishing:
            return
        with suppress(OSError, ValueError):
            print(
                f"not stopped after {self._patience_s:g} s; what was saved before counts", file=sys.stderr, flush=True
            )
        os._exit(128 + number)


def name_parent() -> dict[str, str]:
    """Return the variable from which a program that this process starts knows whom it must not outlive."""
    return {PARENT_VARIABLE: json.dumps(dict(ProcessIdentity.of_this_process().to_record()))}


def watch_parent() -> None:
    """Send this process SIGTERM once the process that started it has ended, if one is named in the environment."""
    with suppress(ValueError):
        parent = ProcessIdentity.from_record(json.loads(os.environ.pop(PARENT_VARIABLE, "null")))
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: ProcessIdentity) -> None:
    while parent.lives() is not False:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
