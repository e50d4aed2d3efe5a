"""Tokenized splits on disk, so that the runs of a study tokenize once; they are read as memory maps."""

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
FORMAT = 1
_UNREADABLE = (OSError, ValueError, EOFError)
ARRAYS = ("tokens", "segments", "offsets", "labels")


def cached_tokens(
    folder: Path, key_parts: Sequence[Any] | None, tokenize: Callable[[], TokenizedSplit]
) -> TokenizedSplit:
    """Return the split that ``tokenize`` makes, from disk where one with equal ``key_parts`` was made before.

    Errors of the cache are treated as a miss.

    Args:
        folder: of the cache.
        key_parts: everything that the tokens depend on; None where that is unknown, and nothing is kept.
        tokenize: makes the split.
    """
    if key_parts is None:
        return tokenize()
    place = folder / hashlib.sha256(repr([FORMAT, *key_parts]).encode()).hexdigest()[:24]
    with suppress(*_UNREADABLE):
        return _read(place)
    split = tokenize()
    with suppress(*_UNREADABLE):
        return _read(place)  # another process was faster, and others may be reading what it wrote
    with suppress(*_UNREADABLE):
        replace_folder(place, partial(_fill, split))
        return _read(place)
    return split


def _read(place: Path) -> TokenizedSplit:
    tokens, segments, offsets, labels = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    if len(offsets) != len(labels) + 1 or offsets[-1] != len(tokens) or len(segments) not in (0, len(tokens)):
        raise ValueError("arrays of unlike lengths")
    return TokenizedSplit(tokens, segments if len(segments) else None, offsets, labels)


def _fill(split: TokenizedSplit, folder: Path) -> None:
    for name in ARRAYS:
        array = getattr(split, name)
        # An empty array where there are no segments: a missing file means a damaged entry.
        np.save(folder / f"{name}.npy", np.zeros(0, dtype=np.int8) if array is None else array)
