"""The finished trials of a search, so that a search that was stopped makes only those that are left."""

from __future__ import annotations

import json
import logging
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fwlora.experiment.files import write_files
from fwlora.experiment.json_types import JsonMapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that was made.

    Attributes:
        values: name in the search space -> value that was sampled.
        objective: None of a trial whose values could not make a run.
        seconds: that it took.
        reason: why it could not be made.
    """

    values: JsonMapping
    objective: float | None
    seconds: float
    reason: str = ""


class TrialLog:
    """A file of finished trials, one to a line with its checksum.

    Args:
        path: of the file; None keeps nothing.
        writes: whether this process writes it.
    """

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes

    def read(self) -> list[FinishedTrial]:
        """Return the trials up to the first line that is damaged."""
        found: list[FinishedTrial] = []
        if self._path is None:
            return found
        with suppress(OSError):
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    checksum, text = line.split(" ", 1)
                    if int(checksum, 16) != zlib.crc32(text.encode()):
                        raise ValueError
                    found.append(FinishedTrial(**json.loads(text)))
                except (ValueError, TypeError):
                    logger.warning(
                        "warning: %s is damaged after %d trials; others are made again", self._path, len(found)
                    )
                    break
        return found

    def write(self, trials: list[FinishedTrial]) -> None:
        """Write all trials anew, through to the disk.

        Raises:
            OSError: they cannot be written.
        """
        if self._path is None or not self._writes:
            return
        texts = [json.dumps(asdict(trial)) for trial in trials]
        content = "".join(f"{zlib.crc32(text.encode()):08x} {text}\n" for text in texts)
        write_files({self._path: content.encode()})
