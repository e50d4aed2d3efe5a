"""Every formula of the library in plain float64 NumPy, for tests and for readers.

No code is shared with what it checks. Symbols: W (d_out, d_in) frozen, A (r, d_in),
B (d_out, r), dW = s B A; X (T, d_in) input and G (T, d_out) gradient of the loss at the output, over T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def weight_gradient(passes: Sequence[tuple[Matrix, Matrix]]) -> Matrix:
    """Return grad W (d_out, d_in): the sum over passes (X, G), and over their tokens t, of g_t x_t^T."""
    total = np.zeros((passes[0][1].shape[1], passes[0][0].shape[1]))
    for X, G in passes:
        for x, g in zip(X, G, strict=True):
            total += np.outer(g, x)
    return total


def exact_squared_norm(passes: Sequence[tuple[Matrix, Matrix]]) -> float:
    """Return ||grad W||_F^2, element by element."""
    return float(sum(element**2 for element in weight_gradient(passes).ravel()))


def sketch_squared_norm(passes: Sequence[tuple[Matrix, Matrix]], P: Matrix) -> float:
    """Return ||grad W P||_F^2 for P (d_in, k)."""
    return float(((weight_gradient(passes) @ P) ** 2).sum())


def sketch_variance(gradient: Matrix, size: int) -> float:
    """Return the variance of ||M P||_F^2 over P = S / sqrt(k), S of independent random signs.

    With H = M^T M, each column's z^T H z has variance 2 sum_{i != j} H_ij^2 (Hutchinson 1990); k of them are averaged.
    """
    H = gradient.T @ gradient
    off_diagonal = sum(H[i, j] ** 2 for i in range(len(H)) for j in range(len(H)) if i != j)
    return float(2 * off_diagonal / size)


def adapter_squared_norm(gradient_B: Matrix, A: Matrix, scaling: float) -> float:
    """Return ||dL/dB||_F^2 d_in / (s^2 ||A||_F^2)."""
    return float((gradient_B**2).sum() * A.shape[1] / (scaling**2 * (A**2).sum()))


def moving_average(squared_norms: Sequence[Matrix], decay: float, every: int = 1) -> Matrix:
    """Return F after optimizer steps of which the first and then every ``every``-th is measured, with beta^every.

    Args:
        squared_norms: one vector (matrices,) per optimizer step; a step that is not finite is left out.
        decay: beta.
        every: n.
    """
    F = np.zeros_like(squared_norms[0])
    for step, norms in enumerate(squared_norms):
        if step % every == 0 and np.isfinite(norms).all():
            F = decay**every * F + (1 - decay**every) * norms
    return F


def importance(F: Matrix, normalization: str) -> Matrix:
    """Return I: F / sum F, F / max F, min(1, F / (2 mean F)), or 0 everywhere."""
    if normalization == "sum":
        return np.array([f / sum(F) for f in F])
    if normalization == "max":
        return np.array([f / max(F) for f in F])
    if normalization == "mean":
        return np.array([min(1.0, f / (2 * sum(F) / len(F))) for f in F])
    return np.zeros_like(F)


def penalty(factors: Sequence[tuple[Matrix, Matrix, float]], I: Matrix, strength: float) -> float:  # noqa: E741
    """Return lambda sum_m (1 - I_m) ||s_m B_m A_m||_F^2 for factors (A_m, B_m, s_m), with dW formed."""
    terms = ((1 - i) * float(((s * B @ A) ** 2).sum()) for (A, B, s), i in zip(factors, I, strict=True))
    return float(strength * sum(terms))


def penalty_gradients(A: Matrix, B: Matrix, scaling: float, i: float, strength: float) -> tuple[Matrix, Matrix]:
    """Return the gradients for A and B by the chain rule: s B^T D and s D A^T with D = 2 lambda (1 - I) dW."""
    D = 2 * strength * (1 - i) * scaling * B @ A
    return scaling * B.T @ D, scaling * D @ A.T


def best_approximation(A: Matrix, B: Matrix, rank: int) -> Matrix:
    """Return the matrix of at most this rank nearest to B A (Eckart and Young), from its singular values."""
    U, singular_values, Vh = np.linalg.svd(B @ A, full_matrices=False)
    best: Matrix = (U[:, :rank] * singular_values[:rank]) @ Vh[:rank]
    return best


def proportional_ranks(costs: Sequence[int], shares: Sequence[float], budget: int, caps: Sequence[int]) -> list[int]:
    """Give ranks by D'Hondt's rule: a unit at a time, to the largest share / ((r + 1) cost) that still fits."""
    ranks = [0] * len(costs)
    while True:
        open_places = [
            m
            for m in range(len(costs))
            if ranks[m] < caps[m] and sum(r * c for r, c in zip(ranks, costs, strict=True)) + costs[m] <= budget
        ]
        if not open_places:
            return ranks
        best = max(open_places, key=lambda m: (shares[m] / (costs[m] * (ranks[m] + 1)), -m))
        ranks[best] += 1
