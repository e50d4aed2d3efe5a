"""Token sequences of unequal length, and which of them share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Batches are cut from runs of this many shuffled batches sorted by length: long enough for little padding, short enough
# that an epoch is still random.
BATCHES_PER_POOL = 50


@dataclass(frozen=True)
class TokenizedSplit:
    """Examples of one split, tokens stored end to end.

    Attributes:
        tokens: int32, all examples' token ids one after another.
        segments: int8 like ``tokens``: which segment a token belongs to; None where all are 0.
        offsets: int64, shape (n + 1,); example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        labels: int64 classes, shape (n,).
    """

    tokens: np.ndarray
    segments: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, shape (n,)."""
        return np.diff(self.offsets)

    def select(self, indices: np.ndarray) -> TokenizedSplit:
        """The given examples, in the given order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        segments = None if self.segments is None else self.segments[places]
        return replace(
            self, tokens=self.tokens[places], segments=segments, offsets=offsets, labels=self.labels[indices]
        )


def plan_epoch(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int, by_length: bool) -> list[np.ndarray]:
    """Batches of one training epoch: every example exactly once, freshly shuffled, the same for equal seed and epoch.

    Args:
        lengths: tokens per example, shape (n,).
        by_length: batches hold examples of like length; their order is random all the same.
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
    """Batches for evaluation: sorted by length, every example exactly once."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collate(
    split: TokenizedSplit,
    indices: Sequence[int] | np.ndarray,
    *,
    pad_token_id: int,
    width: int | None = None,
    pad_left: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and labels of a batch, padded to its longest example, or to ``width``.

    Args:
        pad_left: padding before the tokens, for models that read the last position.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the split has segments, ``token_type_ids``, each (batch, width);
        labels (batch,).
    """
    starts, stops = split.offsets[indices], split.offsets[np.asarray(indices) + 1]
    lengths = stops - starts
    width = width or int(lengths.max())
    mask = np.arange(width) < lengths[:, None]
    if pad_left:
        mask = mask[:, ::-1]
    places = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = split.tokens[places]
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    if split.segments is not None:
        token_type_ids = np.zeros(mask.shape, dtype=np.int64)
        token_type_ids[mask] = split.segments[places]
        inputs["token_type_ids"] = torch.from_numpy(token_type_ids)
    return inputs, torch.from_numpy(split.labels[indices])
