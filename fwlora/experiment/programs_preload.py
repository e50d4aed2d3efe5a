"""Imported by the process of a :class:`fwlora.experiment.programs.WarmServer`; elsewhere it does nothing."""

from __future__ import annotations

import sys

from fwlora.experiment.programs import preload

if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    preload()
