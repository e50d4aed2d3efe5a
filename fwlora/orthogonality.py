"""AdaLoRA's orthogonality term and its gradient in closed form.

    R(P) = ||P P^T - I||_F,   dR/dP = 2 (P P^T - I) P / ||P P^T - I||_F

(Zhang et al., ICLR 2023, arXiv 2303.10512, equation 4, without its squares, as PEFT has it.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def orthogonality_term(factors: Sequence[tuple[Tensor, Tensor]], weight: float) -> Tensor:
    """Return weight / (2 M) sum_m (||A_m A_m^T - I||_F + ||B_m^T B_m - I||_F), a differentiable scalar.

    The derivative at an orthonormal factor, where there is none, is taken as 0.

    Args:
        factors: (A_m, B_m) of M matrices, of shapes (r_m, d_in) and (d_out, r_m), on one device.
        weight: of the mean.
    """
    term: Tensor = _OrthogonalityTerm.apply(weight, *(factor for pair in factors for factor in pair))
    return term


class _OrthogonalityTerm(torch.autograd.Function):
    """The term of A_0, B_0, A_1, ...; its gradients are made in the forward pass, which has the products at hand."""

    @staticmethod
    def forward(ctx: Any, weight: float, *factors: Tensor) -> Tensor:
        value, ctx.gradients = _value_and_gradients(weight, factors)
        ctx.weight = weight
        ctx.save_for_backward(*factors)
        return value

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, *torch._foreach_mul(ctx.gradients, incoming)
        # Under `create_graph` the gradients are differentiated in turn.
        return None, *(incoming * gradient for gradient in _value_and_gradients(ctx.weight, ctx.saved_tensors)[1])


def _value_and_gradients(weight: float, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the term and its gradient by every factor, one batched product for all factors of a shape."""
    rows = [factor.mT if place % 2 else factor for place, factor in enumerate(factors)]
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        alike[row.shape].append(place)
    share, norms = weight / len(rows), []
    gradients: list[Tensor] = [torch.empty(0)] * len(rows)
    for places in alike.values():
        P = torch.stack([rows[place] for place in places])
        excess = torch.bmm(P, P.mT) - torch.eye(P.shape[1], device=P.device, dtype=P.dtype)
        norm = torch.linalg.matrix_norm(excess)
        scale = torch.where(norm == 0, 0.0, 2 * share / norm.clamp(min=torch.finfo(P.dtype).tiny))
        for place, gradient in zip(places, torch.bmm(scale[:, None, None] * excess, P), strict=True):
            gradients[place] = gradient.mT if place % 2 else gradient
        norms.append(norm)
    return share * torch.cat(norms).sum(), gradients
