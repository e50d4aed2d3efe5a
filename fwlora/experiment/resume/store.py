"""Checkpoints on a disk: whole or not there, the last two kept, checked when they are read."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fwlora.experiment.files import delete_folder, digest_file, name_partial, remove_partials, sync_folder, sync_tree

logger = logging.getLogger(__name__)

KEPT = 2
NOTE, TRIALS = "checkpoint.json", "trials.txt"
_NAME = re.compile(r"(\d{6,})-step-(\d+)")


class DamagedCheckpointError(Exception):
    """A checkpoint whose content is not what was written; the message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was read and checked.

    Attributes:
        folder: that holds its files.
        step: optimizer steps taken.
    """

    folder: Path
    step: int


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is a folder of files with ``checkpoint.json``, which holds their SHA-256. It is filled under another
    name, written through to the disk and renamed; only then older ones are deleted. One process writes at a time.

    Args:
        folder: that holds them; made at the first checkpoint.
        keep: how many are kept, the newest.
    """

    def __init__(self, folder: Path, keep: int = KEPT) -> None:
        self.folder, self._keep = folder, keep

    def open_partial(self) -> Path:
        """Make the folder that a new checkpoint is filled in; :meth:`commit` it afterwards.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self.folder)
        partial = name_partial(self.folder / "checkpoint")
        partial.mkdir()
        return partial

    def commit(self, partial: Path, step: int) -> Path:
        """Make a filled folder the newest checkpoint, and delete all but the last ones.

        Args:
            partial: of :meth:`open_partial`.
            step: optimizer steps taken.

        Raises:
            OSError: something cannot be written; the checkpoints that there were are left.
        """
        try:
            digests = {path.name: digest_file(path) for path in sorted(partial.iterdir())}
            (partial / NOTE).write_text(json.dumps({"step": step, "files": digests}), encoding="utf-8")
            sync_tree(partial)
            numbers = [number for number, _ in self._list()]
            final = self.folder / f"{max(numbers, default=0) + 1:06d}-step-{step}"
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(self.folder)
        for _, old in self._list()[: -self._keep]:
            delete_folder(old)
        return final

    def read_newest(self) -> Iterator[Checkpoint]:
        """Yield the intact checkpoints, the newest first; log a warning for every damaged one that is passed over."""
        for _, folder in reversed(self._list()):
            try:
                yield _check(folder)
            except DamagedCheckpointError as damage:
                logger.warning("warning: checkpoint %s is damaged (%s); the one before it is used", folder, damage)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept: no checkpoint, not even a damaged one, and no trial of a search."""
        return not self._list() and not (self.folder / TRIALS).exists()

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint, be it damaged."""
        return bool(self._list())

    def clear(self) -> None:
        """Delete what is kept; files of others, such as models that older versions saved here, are left."""
        for _, checkpoint in self._list():
            delete_folder(checkpoint)
        remove_partials(self.folder)
        with suppress(OSError):
            (self.folder / TRIALS).unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _list(self) -> list[tuple[int, Path]]:
        with suppress(OSError):
            found = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
            return sorted((int(match[1]), path) for match, path in found)
        return []


def _check(folder: Path) -> Checkpoint:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        digests, step = dict(note["files"]), int(note["step"])
        for name, expected in digests.items():
            if digest_file(folder / name) != expected:
                raise DamagedCheckpointError(f"{name} is not what was written")
    except OSError as error:
        raise DamagedCheckpointError(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpointError(f"{NOTE} is not what was written") from None
    return Checkpoint(folder, step)
