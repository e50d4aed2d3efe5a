"""The shrinkage term and its gradient, from r x r products. Pure functions of factors.

    R = lambda sum_m w_m ||dW_m||_F^2,   dW_m = s_m B_m A_m,   w_m = 1 - I_m
    ||B A||_F^2 = tr((B^T B)(A A^T))
    dR/dB_m = 2 lambda w_m s_m^2 B_m (A_m A_m^T),   dR/dA_m = 2 lambda w_m s_m^2 (B_m^T B_m) A_m

No product is larger than the factors themselves: dW is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_delta_norm(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """||s B A||_F^2 for A (..., r, d_in) and B (..., d_out, r): shape (...), differentiable."""
    return scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum(dim=(-2, -1))


def shrinkage_penalty(
    factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], weights: Tensor, strength: float
) -> Tensor:
    """lambda sum_m w_m ||s_m B_m A_m||_F^2, differentiable, a scalar.

    Args:
        factors: (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m).
        scalings: s_m.
        weights: w_m, shape (matrices,).
        strength: lambda.
    """
    norms = [squared_delta_norm(A, B, s) for (A, B), s in zip(factors, scalings, strict=True)]
    return strength * (weights * torch.stack(norms)).sum()


@torch.no_grad()
def shrinkage_gradients(A: Tensor, B: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradient of c_m ||B_m A_m||_F^2 for matrices of one shape, as one batched product.

    Args:
        A: shape (matrices, r, d_in).
        B: shape (matrices, d_out, r).
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).

    Returns:
        gradient for A, gradient for B, and the value sum_m c_m ||B_m A_m||_F^2.
    """
    BtB, AAt = B.mT @ B, A @ A.mT
    factor = 2 * coefficients[:, None, None]
    value = (coefficients * (BtB * AAt).sum(dim=(-2, -1))).sum()
    return factor * (BtB @ A), factor * (B @ AAt), value
