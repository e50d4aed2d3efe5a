"""The shrinkage term and its gradient, from r x r products.

    R = lambda sum_m w_m ||dW_m||_F^2,   dW_m = s_m B_m A_m,   w_m = 1 - I_m
    ||B A||_F^2 = tr((B^T B)(A A^T))
    dR/dB_m = 2 lambda w_m s_m^2 B_m (A_m A_m^T),   dR/dA_m = 2 lambda w_m s_m^2 (B_m^T B_m) A_m

No product is larger than the factors themselves: dW is never formed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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


@torch.no_grad()
def shrinkage_gradients(A: Tensor, B: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of c_m ||B_m A_m||_F^2 for matrices of one shape, in closed form, as one batched product.

    Args:
        A: shape (matrices, r, d_in).
        B: shape (matrices, d_out, r).
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).

    Returns:
        gradient for A, gradient for B, and the value sum_m c_m ||B_m A_m||_F^2.
    """
    weighted = (2 * coefficients)[:, None, None] * (B.mT @ B)
    AAt = A @ A.mT
    value = 0.5 * torch.dot(weighted.flatten(), AAt.flatten())
    return weighted @ A, B @ ((2 * coefficients)[:, None, None] * AAt), value


class BatchedShrinkage:
    """Add the shrinkage gradient to many adapters, with one batched product per matrix shape.

    Ranks within a shape may differ: factors are copied into stacks that are padded with zeros, which change no product.
    The stacks take as much memory as the adapters themselves.

    Args:
        factors: parameters (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m), r_m >= 1.
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], coefficients: Tensor) -> None:
        members: dict[tuple[int, int, torch.device], list[int]] = defaultdict(list)
        for index, (A, B) in enumerate(factors):
            members[A.shape[1], B.shape[0], A.device].append(index)
        self._parameters: list[Tensor] = []
        self._views: list[Tensor] = []
        self._stacks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._ranks: list[list[int]] = []
        for (width_in, width_out, device), indices in members.items():
            rank = max(factors[index][0].shape[0] for index in indices)
            dtype = torch.promote_types(factors[indices[0]][0].dtype, torch.float32)
            A_stack = torch.zeros(len(indices), rank, width_in, device=device, dtype=dtype)
            B_stack = torch.zeros(len(indices), width_out, rank, device=device, dtype=dtype)
            for place, index in enumerate(indices):
                A, B = factors[index]
                self._parameters += [A, B]
                self._views += [A_stack[place, : A.shape[0]], B_stack[place, :, : A.shape[0]]]
            self._ranks.append([factors[index][0].shape[0] for index in indices])
            self._stacks.append((A_stack, B_stack, coefficients[indices].to(device, dtype)))

    @torch.no_grad()
    def add_gradients(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add ``factor`` times the gradient to ``grad`` of every trained factor; return the term's value."""
        # On a GPU each call over all factors is a single kernel.
        torch._foreach_copy_(self._views, self._parameters)
        results = [shrinkage_gradients(A, B, coefficients * factor) for A, B, coefficients in self._stacks]
        gradients: list[Tensor] = []
        for (for_A, for_B, _), ranks in zip(results, self._ranks, strict=True):
            for of_A, of_B, rank in zip(for_A.unbind(), for_B.unbind(), ranks, strict=True):
                gradients += [of_A, of_B] if rank == len(of_A) else [of_A[:rank], of_B[:, :rank]]
        existing, additions = [], []
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype, copy=True).contiguous()
            else:
                existing.append(parameter.grad)
                additions.append(gradient)
        if existing:
            torch._foreach_add_(existing, additions)
        device = results[0][2].device
        return torch.stack([value.to(device) for _, _, value in results]).sum() / factor
