"""From accumulated Fisher proxies F_m to importances I_m. Pure functions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Normalisation = Literal["sum", "max", "mean", "none"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)


def normalise_importance(fisher: Tensor, normalisation: Normalisation = "sum") -> Tensor:
    """Importance of each matrix.

    ``sum``: I_m = F_m / sum F, the specification's. ``max``: I_m = F_m / max F, which reaches 1 and so frees the most
    important matrix from shrinkage. ``mean``: I_m = min(1, F_m / (2 mean F)), so that a matrix of average F is shrunk
    half. ``none``: I_m = 0, uniform shrinkage: the control for whether the weighting does anything.

    Args:
        fisher: F, shape (matrices,), not negative.

    Returns:
        I in [0, 1], shape (matrices,).

    Raises:
        ValueError: unknown normalisation, negative or non-finite F, or F all zero (except for ``none``).
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"`normalisation` is {normalisation!r}; choose one of {', '.join(NORMALISATIONS)}")
    if not torch.isfinite(fisher).all() or (fisher < 0).any():
        raise ValueError("`fisher` holds negative or non-finite values; squared gradient norms cannot be either")
    if normalisation == "none":
        return torch.zeros_like(fisher)
    if not (fisher > 0).any():
        raise ValueError("`fisher` is zero everywhere: no gradient was measured, so no importance can be given")
    if normalisation == "max":
        return fisher / fisher.max()
    if normalisation == "mean":
        return (fisher / (2 * fisher.mean())).clamp_max(1)
    return fisher / fisher.sum()
