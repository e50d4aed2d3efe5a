"""The products of a sketch by compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fwlora.estimators import SketchProducts
from fwlora.experiment.fused.compiled import LANES, RANK_STEP, Kernels


class CompiledSketchProducts(SketchProducts):
    """The products of a sketch, whose X S stays in float32, for X and G in the kernels' type on the CPU.

    Args:
        kernels: of the products' type.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._unit = torch.ones(1)

    def compress(self, X: Tensor, signs: Tensor) -> Tensor:
        """Return X S, float32 of shape (T, k)."""
        if not self._takes(X, signs.shape[1]):
            return super().compress(X, signs)
        low = torch.empty(len(X), signs.shape[1])
        sizes = (*X.shape, signs.shape[1], 1, 0)
        self._kernels("project", X, signs.T.float().contiguous(), low, *sizes, None, 0, self._unit)
        return low

    def reduce(self, compressed: Tensor, G: Tensor) -> Tensor | None:
        """Return (X S)^T G, float32 of shape (k, d_out)."""
        if compressed.dtype != torch.float32 or not self._takes(G, compressed.shape[1]):
            return None
        found = torch.empty(compressed.shape[1], G.shape[1])
        self._kernels("reduce", compressed, G, found, *G.shape, compressed.shape[1], 1, 0, None, 0)
        return found

    def _takes(self, values: Tensor, size: int) -> bool:
        return (
            values.device.type == "cpu"
            and values.dtype == self._kernels.dtype
            and values.is_contiguous()
            and values.shape[1] % LANES == 0
            and size % RANK_STEP == 0
        )
