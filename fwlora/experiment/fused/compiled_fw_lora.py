"""FW-LoRA's own work by compiled kernels: the shrinkage term's gradient, and the products of a sketch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fwlora.estimators import SketchProducts
from fwlora.experiment.fused.compiled import LANES, RANK_STEP, Kernels
from fwlora.shrinkage import BatchedShrinkage, Shrinkage


class CompiledShrinkage:
    """What :class:`fwlora.shrinkage.BatchedShrinkage` does, for factors in float32 on the CPU.

    Args:
        kernels: of any type of products.
        factors: parameters (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m), r_m >= 1, contiguous.
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).
    """

    def __init__(self, kernels: Kernels, factors: Sequence[tuple[Tensor, Tensor]], coefficients: Tensor) -> None:
        self._kernels, self._factors = kernels, list(factors)
        self._sizes = torch.tensor([[len(A), A.shape[1], len(B)] for A, B in factors])
        self._doubled = 2 * coefficients.to(torch.float32)

    @torch.no_grad()
    def add_gradients(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add ``factor`` times the gradient to ``grad`` of every trained factor; return the term's value."""
        scale = float(factor)
        doubled = self._doubled if scale == 1.0 else scale * self._doubled
        values = torch.empty(len(self._factors), dtype=torch.float64)
        columns = ([pair[place] for pair in self._factors] for place in (0, 1))
        addresses = [
            np.array(found, dtype=np.uintp)
            for parameters in columns
            for found in ([p.data_ptr() for p in parameters], [_gradient_address(p) for p in parameters])
        ]
        A, dA, B, dB = (each.ctypes.data for each in addresses)
        self._kernels("shrink", A, B, dA, dB, self._sizes, doubled, values, len(self._factors))
        return (values.sum() / scale).to(self._doubled.dtype)


def make_shrinkage(kernels: Kernels, factors: Sequence[tuple[Tensor, Tensor]], coefficients: Tensor) -> Shrinkage:
    """Return the compiled form where it takes the factors, else that of torch's operations."""
    parameters = [parameter for pair in factors for parameter in pair]
    suits = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return CompiledShrinkage(kernels, factors, coefficients) if suits else BatchedShrinkage(factors, coefficients)


def _gradient_address(parameter: Tensor) -> int:
    """Return where the gradient is added; 0 of a frozen parameter."""
    if not parameter.requires_grad:
        return 0
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad.data_ptr()


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
