"""Tokenised splits on disk, so that the runs of a study tokenise once; read back as memory maps, not into memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwlora.experiment.batching import TokenizedSplit

ARRAYS = ("tokens", "offsets", "labels")
SEGMENTS = "segments"


def cached_tokens(
    folder: Path, key_parts: Sequence[Any] | None, tokenize: Callable[[], TokenizedSplit]
) -> TokenizedSplit:
    """The split that ``tokenize`` makes, from disk where it was made before with equal ``key_parts``.

    A folder that cannot be written, or files in it that cannot be read, cost the time to tokenise and nothing else.

    Args:
        key_parts: everything that the tokens depend on; None where that cannot be told, and nothing is kept.
    """
    if key_parts is None:
        return tokenize()
    place = folder / hashlib.sha256(repr(list(key_parts)).encode()).hexdigest()[:24]
    try:
        return _read(place)
    except (OSError, ValueError, EOFError):
        split = tokenize()
    try:
        _write(split, place)
        return _read(place)
    except (OSError, ValueError, EOFError):
        return split


def _read(place: Path) -> TokenizedSplit:
    tokens, offsets, labels = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    segments = place / f"{SEGMENTS}.npy"
    split = TokenizedSplit(tokens, np.load(segments, mmap_mode="r") if segments.exists() else None, offsets, labels)
    if len(split.offsets) != len(split.labels) + 1 or split.offsets[-1] != len(split.tokens):
        raise ValueError("arrays of unlike lengths")
    return split


def _write(split: TokenizedSplit, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        for name in ARRAYS:
            np.save(partial / f"{name}.npy", getattr(split, name))
        if split.segments is not None:
            np.save(partial / f"{SEGMENTS}.npy", split.segments)
        if place.exists():  # unreadable, or another process was faster
            shutil.rmtree(place, ignore_errors=True)
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
