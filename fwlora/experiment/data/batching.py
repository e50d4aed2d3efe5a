"""Batches of token sequences of unequal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Shuffled examples are sorted by length within this many batches: enough for little padding, few enough that an epoch
# is still random.
BATCHES_PER_POOL = 50


@dataclass(frozen=True)
class TokenizedSplit:
    """Examples of one split, tokens stored end to end.

    Attributes:
        tokens: int32, all examples' token ids one after another.
        segments: int8 like ``tokens``: which segment a token belongs to; None where all are 0.
        offsets: int64, shape (n + 1,); example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        labels: int64 classes or float32 numbers, shape (n,).
        cut: number of examples that were longer than the cap and lost their rest.
    """

    tokens: np.ndarray
    segments: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    cut: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens per example, shape (n,)."""
        return np.diff(self.offsets)

    def select(self, indices: np.ndarray) -> TokenizedSplit:
        """Return the examples at ``indices``, in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        segments = None if self.segments is None else self.segments[places]
        return replace(
            self, tokens=self.tokens[places], segments=segments, offsets=offsets, labels=self.labels[indices]
        )


def plan_epoch(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int, by_length: bool) -> list[np.ndarray]:
    """Plan the batches of one training epoch: every example once, shuffled anew, the same for equal seed and epoch.

    Args:
        lengths: tokens per example, shape (n,).
        batch_size: examples per batch.
        seed: of the order.
        epoch: from 0.
        by_length: whether batches hold examples of like length; their order is random all the same.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if by_length:
        pool = batch_size * BATCHES_PER_POOL
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in pools])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))] if by_length else batches


def plan_evaluation(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Plan the batches of an evaluation: sorted by length, every example once."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Padding:
    """How examples of unequal length become one tensor.

    Attributes:
        token_id: of the padding.
        left: before the tokens, for models that read the last position.
        width: pad every batch to this many tokens; None pads to the longest example of a batch.
        multiple: round widths up to a multiple of this, for devices that are fast with few shapes.
        max_width: round up to this many tokens at most.
    """

    token_id: int
    left: bool = False
    width: int | None = None
    multiple: int = 1
    max_width: int | None = None


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    Attributes:
        input_ids: shape (examples, width).
        attention_mask: 1 at tokens, 0 at padding, like ``input_ids``; None where nothing is padded.
        token_type_ids: like ``input_ids``; None where all are 0.
        labels: shape (examples,).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of a classifier, without those that are None."""
        named = {
            "input_ids": self.input_ids, "attention_mask": self.attention_mask, "token_type_ids": self.token_type_ids,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}


def collate(
    split: TokenizedSplit, batches: Sequence[np.ndarray], padding: Padding, device: torch.device
) -> list[Batch]:
    """Pad several batches together and move them to the device, tokens, masks and labels as one tensor each."""
    order = np.concatenate(batches)
    counts = np.array([len(batch) for batch in batches])
    starts, lengths = split.offsets[order], split.lengths[order]
    widths = np.array([padding.width or split.lengths[batch].max() for batch in batches])
    rounded = -(-widths // padding.multiple) * padding.multiple
    widths = rounded if padding.max_width is None else np.where(rounded <= padding.max_width, rounded, widths)
    row_widths = np.repeat(widths, counts)
    row_ends = np.cumsum(row_widths)
    row_starts = row_ends - lengths if padding.left else row_ends - row_widths
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places, sources = np.repeat(row_starts, lengths) + within, np.repeat(starts, lengths) + within
    size = int(row_ends[-1])
    flat = {"input_ids": np.full(size, padding.token_id, dtype=np.int64)}
    flat["input_ids"][places] = split.tokens[sources]
    flat["attention_mask"] = np.zeros(size, dtype=np.int64)
    flat["attention_mask"][places] = 1
    if split.segments is not None:
        flat["token_type_ids"] = np.zeros(size, dtype=np.int64)
        flat["token_type_ids"][places] = split.segments[sources]
    moved = {name: _move(values, device) for name, values in flat.items()}
    labels = _move(split.labels[order], device).split(counts.tolist())
    padded = lengths != row_widths
    bounds, rows = np.cumsum(counts * widths), np.cumsum(counts)
    made = []
    for place, (count, width) in enumerate(zip(counts.tolist(), widths.tolist(), strict=True)):
        part = slice(int(bounds[place]) - count * width, int(bounds[place]))
        named = {name: values[part].view(count, width) for name, values in moved.items()}
        mask = named["attention_mask"] if padded[rows[place] - count : rows[place]].any() else None
        made.append(Batch(named["input_ids"], mask, named.get("token_type_ids"), labels[place]))
    return made


def stage(
    split: TokenizedSplit, batches: Sequence[np.ndarray], padding: Padding, device: torch.device
) -> Iterator[Batch]:
    """Yield batches in order, prepared :data:`BATCHES_PER_POOL` at a time: little work per step, bounded memory."""
    for start in range(0, len(batches), BATCHES_PER_POOL):
        yield from collate(split, batches[start : start + BATCHES_PER_POOL], padding, device)


def _move(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
