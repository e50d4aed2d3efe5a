"""Change the rank of a LoRA update and keep the update. Pure functions of factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def resize_factors(A: Tensor, B: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return factors of another rank with the product B A, or its best approximation where the rank is smaller.

    A smaller rank keeps the directions of the largest singular values of B A (Eckart and Young, 1936). The rows of the
    new A are orthogonal, with the root mean square length of those of A, so that the ratio of the factors' norms stays.
    A larger rank appends rows to A as PEFT initializes them (uniform, variance 1 / (3 d_in)) and zeros to B: the update
    does not change.

    Args:
        A: shape (r, d_in).
        B: shape (d_out, r).
        rank: r' >= 0.
        generator: of appended rows, on the CPU.

    Returns:
        A' (r', d_in) and B' (d_out, r'), in the types of A and B.
    """
    former = A.shape[0]
    if rank == former:
        return A.clone(), B.clone()
    if rank > former:
        bound = 1 / math.sqrt(A.shape[1])
        rows = torch.empty(rank - former, A.shape[1], dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        return torch.cat([A, rows.to(A)]), torch.cat([B, B.new_zeros(B.shape[0], rank - former)], dim=1)
    left, left_core = torch.linalg.qr(B.double())
    right, right_core = torch.linalg.qr(A.double().T)
    U, singular_values, Vh = torch.linalg.svd(left_core @ right_core.T)
    length = A.double().square().sum(dim=1).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    new_A = length * (Vh[:rank] @ right.T)
    new_B = (left @ U[:, :rank]) * (singular_values[:rank] / length)
    return new_A.to(A), new_B.to(B)
