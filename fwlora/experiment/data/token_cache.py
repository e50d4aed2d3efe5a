"""Tokenized splits on disk, so that the runs of a study tokenize once; they are read as memory maps.

What is read is checked against a checksum of what was written. Labels are not kept: they are never worth the risk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.files import replace_folder

# Part of every key; it changes with the layout of the files, or the contents for equal text.
FORMAT = 2
_UNREADABLE = (OSError, ValueError, EOFError)
ARRAYS = ("tokens", "segments", "offsets", "cut")
CHECKSUM = "checksum"


def cached_tokens(
    folder: Path, key_parts: Sequence[Any] | None, labels: np.ndarray, tokenize: Callable[[], TokenizedSplit]
) -> TokenizedSplit:
    """Return the split that ``tokenize`` makes, from disk where one with equal ``key_parts`` was made before.

    Errors of the cache are treated as a miss.

    Args:
        folder: of the cache.
        key_parts: everything that the tokens depend on; None where that is unknown, and nothing is kept.
        labels: of the split.
        tokenize: makes the split.
    """
    if key_parts is None:
        return tokenize()
    place = folder / hashlib.sha256(repr([FORMAT, *key_parts]).encode()).hexdigest()[:24]
    with suppress(*_UNREADABLE):
        return _read(place, labels)
    split = tokenize()
    with suppress(*_UNREADABLE):
        return _read(place, labels)  # another process was faster, and others may be reading what it wrote
    with suppress(*_UNREADABLE):
        replace_folder(place, partial(_fill, split))
        return _read(place, labels)
    return split


def _read(place: Path, labels: np.ndarray) -> TokenizedSplit:
    if (place / CHECKSUM).read_text() != _checksum(place):
        raise ValueError("not what was written")
    tokens, segments, offsets, cut = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    if len(offsets) != len(labels) + 1:
        raise ValueError("another number of examples")
    return TokenizedSplit(tokens, segments if len(segments) else None, offsets, labels, int(cut))


def _checksum(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ARRAYS:
        content = (folder / f"{name}.npy").read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _fill(split: TokenizedSplit, folder: Path) -> None:
    for name in ARRAYS:
        array = getattr(split, name)
        # An empty array where there are no segments: a missing file means a damaged entry.
        np.save(folder / f"{name}.npy", np.zeros(0, dtype=np.int8) if array is None else array)
    (folder / CHECKSUM).write_text(_checksum(folder))
