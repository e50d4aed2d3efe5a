"""The layers of an encoder as one operation of autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwlora.experiment.fused.layer import Hidden, ObserveMatrices
from fwlora.experiment.fused.linear import Adapters

# Takes a layer's index, the names of matrices with one input X (T, d_in), and the gradients G (names, T, d_out) at
# their outputs.
ObserveLayer = Callable[[int, Sequence[str], Tensor, Tensor], None]


class AdaptedGroup(Protocol):
    """Linear layers with one input, whose adapters are stacked."""

    adapted: list[str]

    def gather(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Adapters | None:
        """Stack the members' A (r, d_in) and B (d_out, r), in the order of ``adapted``; return None at rank 0."""

    def scatter(
        self, gradients: tuple[Tensor, Tensor], factors: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of the single factors."""


class EncoderLayer(Protocol):
    """A layer, forward and backward written out; masks, dropouts and tapes are its own."""

    @property
    def groups(self) -> Mapping[str, AdaptedGroup]:
        """The layer's linear layers by group."""

    def enter(self, X: Tensor, probability: float, bits: np.random.BitGenerator | None) -> Hidden:
        """Return the layers' input after its dropout; X are embeddings, shape (T, d)."""

    def lay_out(self, X: Tensor, attention_mask: Tensor | None, batch: int) -> tuple[Tensor, Any]:
        """Return the rows that the layers compute, and what :meth:`forward` takes as their layout.

        Args:
            X: embeddings, shape (batch x width, d).
            attention_mask: shape (batch, width), 0 at padding; None where no example is padded.
            batch: examples.
        """

    def draw(self, batch: int, rows: int, device: torch.device, bits: np.random.BitGenerator) -> Any:
        """Draw the dropouts of a pass of so many examples and rows."""

    def forward(
        self,
        X: Hidden,
        batch: int,
        layout: Any,
        adapters: Mapping[str, Adapters | None],
        dropped: Any,
        *,
        measured: bool = False,
    ) -> tuple[Hidden, Any]:
        """Return the output and a tape."""

    def backward(
        self,
        G: Tensor,
        tape: Any,
        adapters: Mapping[str, Adapters | None],
        observe: ObserveMatrices | None,
        *,
        needs_input: bool,
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Return dL/dX, if it is needed, and the gradients of every group's joint factors."""


@dataclass(frozen=True)
class EncoderCall:
    """One pass of a batch through the layers.

    Attributes:
        layers: of the encoder.
        adapters: every layer's, by group.
        batch: examples.
        layout: of the rows, of the layers' own kind, see ``lay_out``.
        seed: of the pass's dropout on a CPU; None in evaluation.
        embedding_dropout: probability of dropout on the layers' input.
        observe: takes every adapted matrix's input and output gradient; None where no estimator is recording.
    """

    layers: Sequence[EncoderLayer]
    adapters: Sequence[Mapping[str, Adapters | None]]
    batch: int
    layout: Any
    seed: int | None
    embedding_dropout: float
    observe: ObserveLayer | None = None


@torch.no_grad()
def run_forward(call: EncoderCall, X: Tensor, *, keep: bool) -> tuple[Tensor, list[Any]]:
    """Return the first tokens' outputs, shape (batch, d), and the layers' tapes.

    Args:
        call: the batch and the layers.
        X: embeddings before their dropout, the rows of the layout.
        keep: whether tapes are kept for a backward pass.
    """
    bits = None if call.seed is None else np.random.SFC64(call.seed)
    hidden = call.layers[0].enter(X, call.embedding_dropout, bits)
    tapes = []
    for layer, adapters in zip(call.layers, call.adapters, strict=True):
        dropped = {} if bits is None else layer.draw(call.batch, len(X), X.device, bits)
        measured = call.observe is not None
        hidden, tape = layer.forward(hidden, call.batch, call.layout, adapters, dropped, measured=measured)
        if keep:
            tapes.append(tape)
    return hidden.residual, tapes


@torch.no_grad()
def run_backward(call: EncoderCall, G: Tensor, tapes: list[Any]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Return the gradients of every layer's joint factors by group; remove every tape from ``tapes`` after its use."""
    gradient: Tensor | None = G
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for place in reversed(range(len(call.layers))):
        observe = None if call.observe is None else partial(call.observe, place)
        assert gradient is not None
        gradient, gradients = call.layers[place].backward(
            gradient, tapes.pop(), call.adapters[place], observe, needs_input=place > 0
        )
        found.append(gradients)
    return found[::-1]


class EncoderFunction(torch.autograd.Function):
    """:func:`run_forward` and :func:`run_backward` as ``apply(X, call, *factors)``.

    The factors are A and B of every adapted matrix, by layer, group and member; X needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, call: EncoderCall, *factors: Tensor) -> Tensor:
        """Return the first tokens' outputs, shape (batch, d)."""
        output, ctx.tapes = run_forward(call, X, keep=True)
        ctx.call = call
        ctx.save_for_backward(*factors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        """Return the gradients of the factors, from that of the outputs, G (batch, d)."""
        call: EncoderCall = ctx.call
        factors = iter(ctx.saved_tensors)
        if len(ctx.tapes) != len(call.layers):
            raise RuntimeError("the fused encoder's pass was differentiated a second time; call it again instead")
        found = run_backward(call, G.contiguous(), ctx.tapes)
        gradients: list[Tensor | None] = []
        for layer, by_group in zip(call.layers, found, strict=True):
            for name, group in layer.groups.items():
                own = [(next(factors), next(factors)) for _ in group.adapted]
                parts = group.scatter(by_group[name], own) if name in by_group else [(None, None)] * len(own)
                gradients += [gradient for pair in parts for gradient in pair]
        return None, None, *gradients
