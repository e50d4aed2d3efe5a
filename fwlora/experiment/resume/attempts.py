"""Attempts at a run: every start leaves a record of its own, and says which earlier ones it continues."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fwlora.experiment.files import write_files
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.process_identity import ProcessIdentity

OutcomeWord = Literal["finished", "stopped", "failed"]


def now_in_utc() -> str:
    """Return the time in ISO 8601, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Attempt:
    """One start of a run in a recorded mode.

    Attributes:
        number: from 1, one more than any earlier attempt of the run has.
        mode: of the run.
        chain: numbers of the earlier attempts that this one continues, in order; empty of one that starts anew.
        started: ISO 8601 in UTC.
        host: name of the machine.
        process: which process.
        resumed_at: optimizer steps that were taken before.
        identity: what defines the run; see :mod:`fwlora.experiment.resume.identity`.
        outcome: how it ended; None while it is under way, or where it was killed.
        ended: ISO 8601 in UTC.
        reason: of a failure, in one line.
    """

    number: int
    mode: str
    identity: JsonMapping
    chain: list[int] = field(default_factory=list)
    started: str = field(default_factory=now_in_utc)
    host: str = field(default_factory=platform.node)
    process: JsonMapping = field(default_factory=lambda: dict(ProcessIdentity.of_this_process().to_record()))
    resumed_at: int = 0
    outcome: OutcomeWord | None = None
    ended: str | None = None
    reason: str | None = None

    def for_record(self) -> JsonObject:
        """Return what the tracker's config entry ``attempt`` holds."""
        names = ("number", "chain", "started", "host", "process", "resumed_at")
        return {name: value for name, value in asdict(self).items() if name in names}


class AttemptLog:
    """The attempts of one run, a JSON file each; the run's lock is held by who writes.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[Attempt]:
        """Return the records that can be read, in the order of their numbers."""
        found, known = [], {item.name for item in fields(Attempt)}
        for path in sorted(self.folder.glob("[0-9]*.json")):
            with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
                record = json.loads(path.read_text(encoding="utf-8"))
                found.append(Attempt(**{name: value for name, value in record.items() if name in known}))
        return found

    def start(self, mode: str, identity: JsonMapping, chain: Sequence[int], resumed_at: int) -> Attempt:
        """Record that an attempt starts.

        Args:
            mode: of the run.
            identity: of the run.
            chain: numbers of the earlier attempts that it continues.
            resumed_at: optimizer steps that were taken before.

        Raises:
            OSError: the record cannot be written.
        """
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.json") if path.stem.isdigit()]
        attempt = Attempt(max(numbers, default=0) + 1, mode, identity, list(chain), resumed_at=resumed_at)
        self._write(attempt)
        return attempt

    def end(self, attempt: Attempt, outcome: OutcomeWord, reason: str | None = None) -> None:
        """Record how an attempt ended.

        Raises:
            OSError: the record cannot be written.
        """
        attempt.outcome, attempt.ended, attempt.reason = outcome, now_in_utc(), reason
        self._write(attempt)

    def _write(self, attempt: Attempt) -> None:
        content = json.dumps(asdict(attempt), indent=1) + "\n"
        write_files({self.folder / f"{attempt.number:06d}.json": content.encode()})
