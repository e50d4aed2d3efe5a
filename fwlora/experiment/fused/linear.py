"""Frozen linear layers that read one input, with their adapters, forward and backward written out.

    Y_i = a (X W_i^T + b_i + s_i D_i(X) A_i^T B_i^T)

with D_i the adapter's dropout and a a factor of the caller's. Autograd over PEFT's layer reads and writes whole
activations for the dropout, the up-projection, its multiple by s, the sum, and each of these backward; here s and a are
factors of products that add to their output, and query, key and value share one product down and one up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwlora.experiment.fused.dropout import DropoutMask
from fwlora.experiment.fused.read_model import LinearParts


@dataclass(frozen=True)
class Adapters:
    """The adapters of a group, stacked and padded to the group's largest rank.

    Attributes:
        A: s_i A_i, shape (n, r, d_in).
        B: shape (n, d_out, r).
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class GroupTape:
    """What the backward pass of a group needs.

    Attributes:
        inputs: X, shape (T, d_in).
        kept: D(X) for every adapted member, unscaled, shape (n, T, d_in); None without adapters.
        down: kept A^T, shape (n, T, r).
        dropped: the adapters' dropout, over all of ``kept``.
    """

    inputs: Tensor
    kept: Tensor | None
    down: Tensor | None
    dropped: DropoutMask | None


def split_members(members: Mapping[str, LinearParts]) -> tuple[list[str], list[str]]:
    """Return the names of those with adapters, and all names in the order of a group: those first."""
    adapted = [name for name, parts in members.items() if parts.adapted]
    return adapted, [*adapted, *(name for name in members if name not in adapted)]


class FusedGroup:
    """Linear layers of equal shape with one input, those with adapters first.

    Args:
        members: name -> weights; all adapters have the same dropout.
        scalings: s by name of the adapted members.
        dtype: to multiply in.
    """

    def __init__(self, members: dict[str, LinearParts], scalings: dict[str, float], dtype: torch.dtype) -> None:
        self.adapted, self.names = split_members(members)
        self.weights = [members[name].weight.detach().to(dtype) for name in self.names]
        biases = [members[name].bias for name in self.names]
        self.biases = [None if bias is None else bias.detach().to(dtype) for bias in biases]
        self.scalings = [scalings[name] for name in self.adapted]
        self.dropout = max((members[name].dropout for name in self.adapted), default=0.0)
        self.dtype = dtype
        self.d_out, self.d_in = self.weights[0].shape

    def gather(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Adapters | None:
        """Stack the members' A (r, d_in) and B (d_out, r), in the order of ``adapted``; return None at rank 0.

        A member of rank 0 has lost its adapter and is padded like the others.
        """
        ranks = {A.shape[0] for A, _ in factors}
        if not factors or ranks == {0}:
            return None
        if len(ranks) == 1:
            joint_A = torch.stack([A for A, _ in factors]).to(self.dtype)
            joint_B = torch.stack([B for _, B in factors]).to(self.dtype)
        else:
            joint_A = self.weights[0].new_zeros(len(factors), max(ranks), self.d_in)
            joint_B = self.weights[0].new_zeros(len(factors), self.d_out, max(ranks))
            for place, (A, B) in enumerate(factors):
                joint_A[place, : A.shape[0]] = A
                joint_B[place, :, : A.shape[0]] = B
        return Adapters(self._scale_(joint_A), joint_B)

    def forward(
        self,
        X: Tensor,
        adapters: Adapters | None,
        dropped: DropoutMask | None,
        multiple: float = 1.0,
        *,
        consume: bool = False,
    ) -> tuple[Tensor, GroupTape]:
        """Return Y with a = ``multiple``, shape (members, T, d_out), and the tape.

        Args:
            X: shape (T, d_in), of the group's type.
            adapters: of the group, or None.
            dropped: the adapters' dropout, or None.
            multiple: a.
            consume: whether X may be overwritten.
        """
        Y = X.new_empty(len(self.names), X.shape[0], self.d_out)
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            start = Y[place] if bias is None else bias
            torch.addmm(start, X, weight.T, beta=0.0 if bias is None else multiple, alpha=multiple, out=Y[place])
        if adapters is None:
            return Y, GroupTape(X, None, None, None)
        count = len(adapters.A)
        if dropped is None:
            kept, factor = X.expand(count, -1, -1), multiple
        else:
            copies = X[None] if consume and count == 1 else X.repeat(count, 1, 1)
            kept, factor = dropped.zero_(copies), multiple * dropped.scale
        down = torch.bmm(kept, adapters.A.mT)
        Y[:count].baddbmm_(down, adapters.B.mT, alpha=factor)
        return Y, GroupTape(X, kept, down, dropped)

    def backward(
        self, G: Tensor, tape: GroupTape, adapters: Adapters | None, into: Tensor | None, *, needs_input: bool
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Return dL/dX, added to ``into`` where that is given, and the gradients of the joint factors.

        Args:
            G: gradients at the layers' outputs (Y with a = 1), shape (members, T, d_out).
            tape: of the forward pass.
            adapters: of the group, or None.
            into: shape (T, d_in), changed in place.
            needs_input: whether dL/dX is needed.

        Returns:
            dL/dX (T, d_in), None where it is not needed; (dL/dA, dL/dB) for the A and B of :class:`Adapters` before
            s was folded in, None without adapters.
        """
        gradients = None
        if adapters is not None and tape.down is not None and tape.kept is not None:
            count = len(adapters.A)
            factor = 1.0 if tape.dropped is None else tape.dropped.scale
            part = G[:count]
            g = torch.bmm(part, adapters.B).mul_(factor)
            dA = torch.bmm(g.mT, tape.kept)
            # X^T G, not G^T X: on a CPU a short, wide result is faster than a tall, narrow one.
            dB = torch.bmm((tape.down * factor).mT, part).mT
            gradients = (dA, dB)
            if needs_input:
                through = torch.bmm(g, adapters.A)
                if tape.dropped is not None:
                    tape.dropped.zero_(through)
                rest = list(through)
                into = rest.pop() if into is None else into
                for addend in rest:
                    into.add_(addend)
        if not needs_input:
            return None, gradients
        for weight, gradient in zip(self.weights, G, strict=True):
            into = torch.mm(gradient, weight) if into is None else into.addmm_(gradient, weight)
        return into, gradients

    def scatter(
        self, gradients: tuple[Tensor, Tensor], factors: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of the single factors, in the factors' own types."""
        joint_A, joint_B = gradients
        self._scale_(joint_A)
        return [
            (joint_A[place, : A.shape[0]].to(A.dtype), joint_B[place, :, : A.shape[0]].to(B.dtype))
            for place, (A, B) in enumerate(factors)
        ]

    def _scale_(self, joint_A: Tensor) -> Tensor:
        """Multiply every member's part by its s, in place."""
        if len(set(self.scalings)) == 1:
            return joint_A.mul_(self.scalings[0])
        return joint_A.mul_(joint_A.new_tensor(self.scalings)[:, None, None])
