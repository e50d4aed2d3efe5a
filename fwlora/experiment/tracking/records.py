"""A recorded run as plain data: the one form in which evaluation reads runs of every source."""

from __future__ import annotations

import base64
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject, JsonValue
from fwlora.experiment.tracking import metrics

# A row's ``global_step``, and whether it is an optimizer step's rather than an epoch's.
RowKey = tuple[float, bool]
# Ended with exit code 0; ended with another; not ended; its process is gone without an end.
RunState = Literal["finished", "failed", "running", "crashed"]

_ROW_MARKS = ((True, metrics.TRAIN_LOSS), (False, metrics.TRAIN_EPOCH_LOSS))
LARGEST_FLOAT = int(sys.float_info.max)
LARGEST_INTEGER = 2**53  # services keep larger whole numbers as floats, some of them rounded


@dataclass(frozen=True)
class RunRecord:
    """One run as recorded.

    Attributes:
        run_id: the id it was started under.
        config: settings as resolved (``config["run"]`` is the run node) plus ``config["resolved"]``, what the
            program found out: task, label names, precision, data fingerprints, environment.
        summary: final values, by the names of :mod:`fwlora.experiment.tracking.metrics`.
        history: one mapping per logged row, ascending in ``global_step``, each step once.
        state: how it ended.
        source: where it was read, for people: a folder or ``entity/project/run_id``.
        place: where it is recorded, whatever copy of the record was read; empty where that is ``source``.
    """

    run_id: str
    config: JsonMapping
    summary: JsonMapping
    history: Sequence[JsonMapping]
    state: RunState
    source: str
    place: str = ""

    @property
    def finished(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.state == "finished"

    @property
    def resolved(self) -> JsonMapping:
        """The recorded :class:`RunFacts`, as plain values; empty where nothing was recorded."""
        return self.config.get("resolved") or {}

    @property
    def environment(self) -> JsonMapping:
        """Commit, versions and hardware it ran with; see :mod:`fwlora.experiment.tracking.environment`."""
        return self.resolved.get("environment") or {}


class UnreadableRunsError(UserError):
    """Runs that cannot be read.

    Attributes:
        reasons: why each of them could not be read, by run id.
    """

    def __init__(self, reasons: Mapping[str, str], notes: Sequence[str] = ()) -> None:
        """Describe every run in a line.

        Args:
            reasons: by run id.
            notes: lines about all of the runs.
        """
        problems = [*(f"`{run_id}`: {reason}" for run_id, reason in reasons.items()), *notes]
        super().__init__(str(UserError.collect("runs that cannot be read", problems)))
        self.reasons: dict[str, str] = dict(reasons)


def pack_classes(classes: np.ndarray, num_classes: int) -> JsonObject:
    """Pack the classes of a split in data-set order, for a small summary.

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


def pack_values(values: np.ndarray, num_classes: int) -> JsonObject:
    """Pack classes as :func:`pack_classes` does, or numbers, of which 4 bytes are kept each.

    Args:
        values: of a split in data-set order, shape ``(n,)``.
        num_classes: 1 where they are numbers.
    """
    if num_classes > 1:
        return pack_classes(values, num_classes)
    raw = np.asarray(values, dtype="<f4")
    return {"encoding": "float32", "count": int(raw.size), "data": base64.b64encode(raw.tobytes()).decode("ascii")}


def pack_logits(logits: np.ndarray) -> JsonObject:
    """Pack logits of shape ``(n, K)`` as float16, of which a calibration needs no more digits, compressed."""
    limits = np.finfo(np.float16)
    raw = np.clip(logits, limits.min, limits.max).astype("<f2")
    packed = base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode("ascii")
    return {"encoding": "float16+zlib", "count": len(raw), "classes": raw.shape[1], "data": packed}


def unpack_logits(packed: JsonMapping) -> np.ndarray:
    """Unpack what :func:`pack_logits` made: float32, shape ``(n, K)``.

    Raises:
        ValueError: an unknown encoding, damaged data, or another number of values than announced.
    """
    count, classes = packed["count"], packed["classes"]
    if packed["encoding"] != "float16+zlib":
        raise ValueError(f"unknown encoding {packed['encoding']!r}")
    # Data that unpack to more than is announced are not read to their end.
    reader, wanted = zlib.decompressobj(), 2 * count * classes
    try:
        raw = reader.decompress(base64.b64decode(packed["data"]), wanted + 1)
    except zlib.error as error:
        raise ValueError(f"damaged data ({error})") from None
    if len(raw) != wanted:
        raise ValueError(f"{len(raw)} bytes are packed, {wanted} announced")
    return np.frombuffer(raw, dtype="<f2").astype(np.float32).reshape(count, classes)


def unpack_values(packed: JsonMapping) -> np.ndarray:
    """Unpack what :func:`pack_values` made: int64 classes or float32 numbers of shape ``(n,)``.

    Raises:
        ValueError: an unknown encoding or fewer values than ``count`` says.
    """
    raw = np.frombuffer(base64.b64decode(packed["data"]), dtype=np.uint8)
    encoding, count = packed["encoding"], packed["count"]
    if encoding == "bits":
        values = np.unpackbits(raw).astype(np.int64)
    elif encoding == "bytes":
        values = raw.astype(np.int64)
    elif encoding == "float32":
        values = raw[: raw.size - raw.size % 4].view("<f4").astype(np.float32)
    else:
        raise ValueError(f"unknown encoding {encoding!r}")
    if values.size < count:
        raise ValueError(f"{values.size} values are packed, {count} announced")
    return values[:count]


def make_record(
    run_id: str,
    config: JsonMapping,
    summary: JsonMapping,
    rows: Iterable[JsonMapping],
    state: RunState,
    source: str,
    place: str = "",
) -> RunRecord:
    """Make a record in its one form, equal for equal values of any source; see :func:`canonicalize`.

    Args:
        run_id: the id it was started under.
        config: entries by name.
        summary: entries by name.
        rows: history rows as logged, those of abandoned passes among them.
        state: how it ended.
        source: where it was read, for people.
        place: where it is recorded, if that is another place.
    """
    history = deduplicate_history(canonicalize(row) for row in rows)
    given = {name: value for name, value in summary.items() if value is not None}
    return RunRecord(run_id, canonicalize(config), canonicalize(given), history, state, source, place)


def canonicalize(value: JsonValue) -> JsonValue:
    """Return a deep copy in which equal values have one form, whatever service kept them.

    Names are in order, tuples are lists, whole numbers are ``int`` (``float`` beyond 2**53, infinite beyond a float's
    range, as 1e400 is), and a name whose mapping is empty is left out: services do not preserve 1 vs 1.0, or a missing
    name vs an empty mapping.
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= LARGEST_INTEGER else value
    if isinstance(value, int):
        if abs(value) <= LARGEST_INTEGER:
            return value
        return float(value) if abs(value) <= LARGEST_FLOAT else (math.inf if value > 0 else -math.inf)
    if isinstance(value, Mapping):
        spelled = {sys.intern(name): canonicalize(value[name]) for name in sorted(value)}
        return {name: item for name, item in spelled.items() if item != {}}
    return [canonicalize(item) for item in value] if isinstance(value, list | tuple) else value


def row_key(row: Mapping[str, object]) -> RowKey:
    """Return what tells a logged row from the others of its run."""
    step = row[metrics.GLOBAL_STEP]
    assert isinstance(step, int | float)
    return float(step), metrics.TRAIN_LOSS in row


def find_row_keys(history: Iterable[JsonMapping]) -> frozenset[RowKey]:
    """Return the keys of the logged rows that a record's history was merged from."""
    found = set()
    for row in history:
        step = float(row[metrics.GLOBAL_STEP])
        found |= {(step, of_step) for of_step, name in _ROW_MARKS if name in row}
    return frozenset(found)


def deduplicate_history(rows: Iterable[JsonMapping]) -> list[JsonObject]:
    """Return the rows of one training pass, each step once.

    A run that was started again under its id appends to its history. A row whose ``global_step`` does not advance
    starts over from there, so all earlier rows at or beyond that step belong to the abandoned pass; rows of the same
    step within a pass (step values, then epoch values) are merged.
    """
    merged: list[JsonObject] = []
    for row in rows:
        step = row.get(metrics.GLOBAL_STEP)
        if not isinstance(step, int | float):
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
