"""What is kept of a run, as plain data: the form in which evaluation sees every run, wherever it came from."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fwlora.experiment import metrics


# As the tracker saw it: ended with exit code 0; ended with another; not ended; its process is gone without an end.
RunState = Literal["finished", "failed", "running", "crashed"]


@dataclass(frozen=True)
class RunRecord:
    """One run as recorded.

    Attributes:
        run_id: the id it was started under.
        config: settings as resolved (``config["run"]`` is the run node) plus ``config["resolved"]``, what the
            program found out: task, label names, precision, data fingerprints, environment.
        summary: final values, by the names of :mod:`fwlora.experiment.metrics`.
        history: one mapping per logged row, ascending in ``global_step``, each step once.
        state: how it ended.
        source: where it was read, for people: a folder or ``entity/project/run_id``.
    """

    run_id: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    state: RunState
    source: str

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def pack_classes(classes: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Classes of a split in data-set order, as small as a summary should be.

    Args:
        classes: integers in ``[0, num_classes)``, shape ``(n,)``.
        num_classes: two classes take a bit each, up to 256 a byte each.

    Returns:
        ``{"encoding": "bits" | "bytes", "count": n, "data": base64}``.

    Raises:
        ValueError: a class outside the range, or more than 256 classes.
    """
    values = np.asarray(classes)
    if not 2 <= num_classes <= 256:
        raise ValueError(f"`num_classes` is {num_classes}; between 2 and 256 classes can be packed")
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        raise ValueError(f"`classes` holds {values.min()}..{values.max()}, outside 0..{num_classes - 1}")
    raw = np.packbits(values.astype(np.uint8)) if num_classes == 2 else values.astype(np.uint8)
    return {
        "encoding": "bits" if num_classes == 2 else "bytes",
        "count": int(values.size),
        "data": base64.b64encode(raw.tobytes()).decode("ascii"),
    }


def unpack_classes(packed: Mapping[str, Any]) -> np.ndarray:
    """Inverse of :func:`pack_classes`: int64 classes of shape ``(n,)``.

    Raises:
        ValueError: an unknown encoding or fewer values than ``count`` says.
    """
    raw = np.frombuffer(base64.b64decode(packed["data"]), dtype=np.uint8)
    if packed["encoding"] == "bits":
        values = np.unpackbits(raw)
    elif packed["encoding"] == "bytes":
        values = raw
    else:
        raise ValueError(f"unknown class encoding {packed['encoding']!r}")
    if values.size < packed["count"]:
        raise ValueError(f"packed classes hold {values.size} values, {packed['count']} announced")
    return values[: packed["count"]].astype(np.int64)


def deduplicate_history(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one training pass, each step once.

    A run that was started again under its id appends to its history. A row whose ``global_step`` does not advance
    starts over from there, so all earlier rows at or beyond that step belong to the abandoned pass; rows of the same
    step within a pass (step values, then epoch values) are merged.
    """
    merged: list[dict[str, Any]] = []
    for row in rows:
        step = row.get(metrics.GLOBAL_STEP)
        if step is None:
            continue
        values = {name: value for name, value in row.items() if not name.startswith("_")}
        continues_row = merged and merged[-1][metrics.GLOBAL_STEP] == step and metrics.TRAIN_LOSS not in values
        if continues_row:
            merged[-1].update(values)
            continue
        while merged and merged[-1][metrics.GLOBAL_STEP] >= step:
            merged.pop()
        merged.append(values)
    return merged
