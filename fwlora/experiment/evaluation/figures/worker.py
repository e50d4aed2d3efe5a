"""Start of a process that draws figures; every such process imports this module, so it imports little."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from fwlora.experiment.plugins import load_plugins


def prepare_worker() -> None:
    """Ignore interrupts, which the parent process handles, end when the parent ends, and import plugins."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    load_plugins()  # runs are sent here as settings of their methods, which may be a plugin's


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
