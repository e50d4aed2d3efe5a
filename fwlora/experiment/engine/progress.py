"""The progress line that a training process prints and a parent process parses."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 2.0
_LINE = re.compile(r"step (\d+)/(\d+)  epoch (\d+)  loss (\S+)(  fisher warm-up)?")


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    in_warmup: bool


def format_progress(progress: Progress) -> str:
    """Write one line, e.g. ``step 40/300  epoch 1  loss 0.6123  fisher warm-up``."""
    line = f"step {progress.step}/{progress.total_steps}  epoch {progress.epoch}  loss {progress.loss:.4f}"
    return line + ("  fisher warm-up" if progress.in_warmup else "")


def parse_progress(line: str) -> Progress | None:
    """Parse a line of :func:`format_progress`; return None for any other line."""
    found = _LINE.fullmatch(line.strip())
    if found is None:
        return None
    step, total, epoch, loss, warmup = found.groups()
    return Progress(int(step), int(total), int(epoch), float(loss), bool(warmup))


@dataclass
class ProgressPrinter:
    """Log progress at most every :data:`SECONDS_BETWEEN_LINES` seconds, and always the last step."""

    clock: Callable[[], float] = time.monotonic
    _last: float = float("-inf")

    def __call__(self, progress: Progress) -> None:
        """Log the line, if it is due."""
        now = self.clock()
        if now - self._last >= SECONDS_BETWEEN_LINES or progress.step == progress.total_steps:
            self._last = now
            logger.info(format_progress(progress))
