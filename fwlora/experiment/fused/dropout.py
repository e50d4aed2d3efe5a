"""Dropout masks, drawn for many tensors at once.

On a CPU, drawing a random number per element takes longer than multiplying by it. Between two dropped elements lie G
kept ones, and G is geometric: P(G = g) = p (1 - p)^g. Drawing the gaps instead of the elements needs p draws per
element and gives the same distribution: every element is dropped with probability p, independently. On a GPU a mask is
drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class DropoutMask(Protocol):
    """The dropped elements of one tensor.

    Attributes:
        scale: 1 / (1 - p), the factor of the kept elements; the caller applies it, as a factor of a product.
    """

    @property
    def scale(self) -> float:
        """1 / (1 - p)."""

    def zero_(self, values: Tensor) -> Tensor:
        """Set the dropped elements of a contiguous tensor to zero in place, and return it."""


@dataclass(frozen=True)
class DroppedPositions:
    """Flat positions of the dropped elements, ascending."""

    positions: Tensor
    scale: float

    def zero_(self, values: Tensor) -> Tensor:
        """Set the dropped elements to zero in place."""
        values.view(-1).index_fill_(0, self.positions, 0.0)
        return values


@dataclass(frozen=True)
class KeptMask:
    """True where an element is kept."""

    kept: Tensor
    scale: float

    def zero_(self, values: Tensor) -> Tensor:
        """Set the dropped elements to zero in place."""
        values.view(-1).mul_(self.kept)
        return values


# A tensor's number of elements and the probability of each to be dropped.
Request = tuple[int, float]


def draw_dropped(
    requests: Mapping[str, Request], device: torch.device, bit_generator: np.random.BitGenerator
) -> dict[str, DropoutMask]:
    """Draw independent dropouts of several tensors by name; leave out those whose probability is 0.

    Args:
        requests: name -> elements and probability, below 1.
        device: of the tensors.
        bit_generator: of a CPU's draws; a GPU's come from torch's default generator of the device.
    """
    drawn: dict[str, DropoutMask] = {}
    for probability in dict.fromkeys(p for _, p in requests.values() if p > 0):
        names = [name for name, (_, p) in requests.items() if p == probability]
        sizes = [requests[name][0] for name in names]
        parts: Sequence[DropoutMask]
        if device.type == "cpu":
            parts = _draw_positions_of(sizes, probability, bit_generator)
        else:
            kept = torch.rand(sum(sizes), device=device) >= probability
            parts = [KeptMask(part, 1 / (1 - probability)) for part in kept.split(sizes)]
        drawn.update(zip(names, parts, strict=True))
    return drawn


def draw_positions(count: int, probability: float, bit_generator: np.random.BitGenerator) -> Tensor:
    """Draw ascending positions from 1, int64, each up to ``count`` with ``probability``; larger ones follow.

    G = floor(log U / log(1 - p)), with U uniform in (0, 1], from 32 bits.
    """
    parts: list[Tensor] = []
    reached = 0
    while reached < count:
        expected = (count - reached) * probability
        words = int(expected + 6 * math.sqrt(expected)) // 2 + 16
        bits = torch.from_numpy(bit_generator.random_raw(words).view(np.int32))
        uniform = torch.add(0.5, bits, alpha=2.0**-32).clamp_(min=2.0**-33)
        steps = torch.add(1.0, uniform.log_(), alpha=1 / math.log1p(-probability)).to(torch.int64)
        torch.cumsum(steps, 0, out=steps)
        parts.append(steps if reached == 0 else steps.add_(reached))
        reached = int(steps[-1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_positions_of(
    sizes: Sequence[int], probability: float, bit_generator: np.random.BitGenerator
) -> list[DroppedPositions]:
    ends = np.cumsum(sizes)
    positions = draw_positions(int(ends[-1]), probability, bit_generator)
    bounds = np.searchsorted(positions.numpy(), ends, side="right").tolist()
    scale = 1 / (1 - probability)
    parts, low = [], 0
    for start, high in zip((ends - sizes).tolist(), bounds, strict=True):
        parts.append(DroppedPositions(positions[low:high].sub_(start + 1), scale))
        low = high
    return parts
