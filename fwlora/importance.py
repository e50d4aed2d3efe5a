"""From accumulated Fisher proxies F_m to importances I_m. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fwlora.options import NORMALIZATIONS, Normalization


def normalize_importance(fisher: Tensor, normalization: Normalization = "sum") -> Tensor:
    """Return the importance of each matrix.

    ``sum``: I_m = F_m / sum F, the specification's. ``max``: I_m = F_m / max F, so that the most important matrix is
    not shrunk. ``mean``: I_m = min(1, F_m / (2 mean F)), so that a matrix of average F gets half of the shrinkage.
    ``none``: I_m = 0, uniform shrinkage, the control for the weighting.

    Args:
        fisher: F, shape (matrices,), not negative.
        normalization: one of the four.

    Returns:
        I in [0, 1], shape (matrices,).

    Raises:
        ValueError: unknown normalization, negative or non-finite F, or F all zero (except for ``none``).
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}")
    if not torch.isfinite(fisher).all() or (fisher < 0).any():
        raise ValueError("`fisher` holds negative or non-finite values; squared gradient norms cannot be either")
    if normalization == "none":
        return torch.zeros_like(fisher)
    if not (fisher > 0).any():
        raise ValueError("`fisher` is zero everywhere: no gradient was measured, so no importance can be given")
    if normalization == "max":
        return fisher / fisher.max()
    if normalization == "mean":
        return (fisher / (2 * fisher.mean())).clamp_max(1)
    return fisher / fisher.sum()
