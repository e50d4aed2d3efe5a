"""The shrinkage term and its gradient, from r x r products.

    R = lambda sum_m w_m ||dW_m||_F^2,   dW_m = s_m B_m A_m,   w_m = 1 - I_m
    ||B A||_F^2 = tr((B^T B)(A A^T))
    dR/dB_m = 2 lambda w_m s_m^2 B_m (A_m A_m^T),   dR/dA_m = 2 lambda w_m s_m^2 (B_m^T B_m) A_m

No product is larger than the factors themselves: dW is never formed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


def squared_product_norm(A: Tensor, B: Tensor) -> Tensor:
    """Return ||B A||_F^2 for A (..., r, d_in) and B (..., d_out, r): shape (...), differentiable."""
    return ((B.mT @ B) * (A @ A.mT)).sum(dim=(-2, -1))


def squared_delta_norm(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ||s B A||_F^2 for A (..., r, d_in) and B (..., d_out, r): shape (...), differentiable."""
    return scaling**2 * squared_product_norm(A, B)


def shrinkage_penalty(
    factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], weights: Tensor, strength: float
) -> Tensor:
    """Return lambda sum_m w_m ||s_m B_m A_m||_F^2, differentiable, a scalar.

    Args:
        factors: (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m).
        scalings: s_m.
        weights: w_m, shape (matrices,).
        strength: lambda.
    """
    norms = [squared_delta_norm(A, B, s).to(weights.device) for (A, B), s in zip(factors, scalings, strict=True)]
    return strength * (weights * torch.stack(norms)).sum()


class Shrinkage(Protocol):
    """Adds the shrinkage gradient of factors that it was made with; see :class:`BatchedShrinkage`."""

    def add_gradients(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add ``factor`` times the gradient to ``grad`` of every trained factor; return the term's value."""


# From factors and coefficients, as :class:`BatchedShrinkage` takes them.
MakeShrinkage = Callable[[Sequence[tuple[Tensor, Tensor]], Tensor], Shrinkage]


class BatchedShrinkage:
    """Add the shrinkage gradient to many adapters, with one batched product per width of a factor.

    A_m and B_m^T are rows of the stacks alike: with G = F F^T of every factor F, the gradient of A_m is
    2 c_m G(B_m^T) A_m, and that of B_m^T is 2 c_m G(A_m) B_m^T. Ranks may differ: zeros pad them, which change no
    product. Stacks and gradients take twice the memory of the adapters.

    Args:
        factors: parameters (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m), r_m >= 1.
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], coefficients: Tensor) -> None:
        members: dict[torch.device, list[int]] = defaultdict(list)
        for index, (A, _) in enumerate(factors):
            members[A.device].append(index)
        self._parts = [
            _DeviceShrinkage([factors[index] for index in indices], coefficients[indices])
            for indices in members.values()
        ]

    @torch.no_grad()
    def add_gradients(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add ``factor`` times the gradient to ``grad`` of every trained factor; return the term's value."""
        values = [part.add_gradients(factor) for part in self._parts]
        return values[0] if len(values) == 1 else torch.stack([value.to(values[0].device) for value in values]).sum()


class _DeviceShrinkage:
    """:class:`BatchedShrinkage` of factors on one device."""

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], coefficients: Tensor) -> None:
        rank = max(len(A) for A, _ in factors)
        dtype = torch.promote_types(factors[0][0].dtype, torch.float32)
        device = factors[0][0].device
        # A_m at 2 m, B_m at 2 m + 1.
        rows = [row for A, B in factors for row in (A, B.mT)]
        by_width: dict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            by_width[row.shape[1]].append(place)
        order = [place for places in by_width.values() for place in places]
        self._stacks = [torch.zeros(len(p), rank, width, device=device, dtype=dtype) for width, p in by_width.items()]
        self._gradients = [torch.zeros_like(stack) for stack in self._stacks]
        self._sizes = [len(stack) for stack in self._stacks]
        position = {place: number for number, place in enumerate(order)}
        # Of every factor, in stacked order, the other factor of its matrix.
        self._partners = torch.tensor([position[place ^ 1] for place in order], device=device)
        own = coefficients.to(device, dtype)
        self._doubled = 2 * own[torch.tensor([place // 2 for place in order], device=device)][:, None, None]
        self._parameters = [factors[place // 2][place % 2] for place in order]
        self._views = self._view(self._stacks, order)
        self._additions = self._view(self._gradients, order)

    def _view(self, stacks: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
        """Return the parts of the stacks that belong to the parameters, in these' shapes."""
        parts = [part for stack in stacks for part in stack]
        views = []
        for parameter, part, place in zip(self._parameters, parts, order, strict=True):
            is_B = place % 2 == 1
            own = part[: parameter.shape[1 if is_B else 0]]
            views.append(own.mT if is_B else own)
        return views

    def add_gradients(self, factor: float | Tensor) -> Tensor:
        # On a GPU each call over all factors is a single kernel.
        torch._foreach_copy_(self._views, self._parameters)
        grams = torch.cat([torch.bmm(stack, stack.mT) for stack in self._stacks])
        doubled = self._doubled if isinstance(factor, float) and factor == 1.0 else self._doubled * factor
        weighted = grams[self._partners].mul_(doubled)
        for stack, gradient, part in zip(self._stacks, self._gradients, weighted.split(self._sizes), strict=True):
            torch.bmm(part, stack, out=gradient)
        existing, additions = [], []
        for parameter, gradient in zip(self._parameters, self._additions, strict=True):
            if not parameter.requires_grad:
                continue
            held = parameter.grad
            if held is None:
                parameter.grad = gradient.to(parameter.dtype, copy=True).contiguous()
            else:
                existing.append(held)
                additions.append(gradient)
        if existing:
            torch._foreach_add_(existing, additions)
        # Every matrix is met twice, each time with 2 c_m.
        return torch.dot(weighted.view(-1), grams.view(-1)) / (4 * factor)
