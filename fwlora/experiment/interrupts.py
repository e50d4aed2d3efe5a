"""Ctrl-C while a program still imports its libraries: one word instead of a traceback.

A program under ``src/`` imports this module before all others, and so asks for it; elsewhere the import does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from fwlora.experiment.errors import EXIT_INTERRUPTED

_PROGRAMS = "src."


def _exit(number: int, frame: object) -> NoReturn:
    # Nothing is open yet, and an exception could be taken for an import that failed.
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def is_program() -> bool:
    """Return whether this process was started as ``python -m src.<program>``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.startswith(_PROGRAMS)


def end_imports() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A process that is started in the background ignores SIGINT, and is to go on doing so.
if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit)
