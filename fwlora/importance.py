"""From squared gradient norms to the Fisher proxies F_m, and from these to importances I_m."""

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


class FisherAccumulator:
    """F_m <- beta^n F_m + (1 - beta^n) ||grad W_m||_F^2, one update per measured step, n steps apart.

    A step with a gradient that is not finite is counted and does not enter F. No call waits for the device.

    Args:
        count: matrices.
        decay: beta^n in [0, 1).
        device: where F lives; it follows a model that is moved.
        dtype: of F.

    Attributes:
        values: F, shape (matrices,).
        measured: scalar tensor, steps that entered F.
        skipped: scalar tensor, steps that did not.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    def __init__(
        self, count: int, decay: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` is {decay}; an averaging factor is at least 0 and below 1")
        self.decay = decay
        self.values = torch.zeros(count, device=device, dtype=dtype)
        self.measured = torch.zeros((), device=device, dtype=torch.int64)
        self.skipped = torch.zeros((), device=device, dtype=torch.int64)

    def update(self, squared_norms: Tensor) -> None:
        """Take one step's squared gradient norms, shape (matrices,)."""
        if self.values.device != squared_norms.device:  # the model was moved after attaching
            tensors = (self.values, self.measured, self.skipped)
            self.values, self.measured, self.skipped = (tensor.to(squared_norms.device) for tensor in tensors)
        norms = squared_norms.to(self.values.dtype)
        finite = torch.isfinite(norms).all()
        self.values = torch.where(finite, torch.lerp(self.values, norms, 1 - self.decay), self.values)
        self.measured += finite
        self.skipped += ~finite
