"""The gradients of the methods' own terms by compiled kernels: FW-LoRA's shrinkage, AdaLoRA's orthogonality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fwlora.experiment.fused.compiled import Kernels
from fwlora.shrinkage import BatchedShrinkage, Shrinkage

Factors = Sequence[tuple[Tensor, Tensor]]


class CompiledShrinkage:
    """What :class:`fwlora.shrinkage.BatchedShrinkage` does, for factors that :func:`takes_factors` accepts.

    Args:
        kernels: of any type of products.
        factors: parameters (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m), r_m >= 1.
        coefficients: c_m = lambda w_m s_m^2, shape (matrices,).
    """

    def __init__(self, kernels: Kernels, factors: Factors, coefficients: Tensor) -> None:
        self._kernels, self._factors = kernels, _FactorArguments(factors)
        self._doubled = 2 * coefficients.to(torch.float32)

    @torch.no_grad()
    def add_gradients(self, factor: float | Tensor = 1.0) -> Tensor:
        """Add ``factor`` times the gradient to ``grad`` of every trained factor; return the term's value."""
        scale = float(factor)
        doubled = self._doubled if scale == 1.0 else scale * self._doubled
        values = self._factors.call(self._kernels, "shrink", doubled)
        return (values.sum() / scale).to(self._doubled.dtype)


class CompiledOrthogonality:
    """What :func:`fwlora.orthogonality.orthogonality_term` and its backward pass do.

    Args:
        kernels: of any type of products.
        factors: parameters (A_m, B_m) of shapes (r_m, d_in) and (d_out, r_m), that :func:`takes_factors` accepts.
        weight: of the term.
    """

    def __init__(self, kernels: Kernels, factors: Factors, weight: float) -> None:
        self._kernels, self._factors = kernels, _FactorArguments(factors)
        self._share = weight / (2 * len(factors))

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Add the gradient to ``grad`` of every trained factor; return the term's value."""
        return self._factors.call(self._kernels, "orthogonalize", self._share).sum().to(torch.float32)


def make_shrinkage(kernels: Kernels, factors: Factors, coefficients: Tensor) -> Shrinkage:
    """Return the compiled form where it takes the factors, else that of torch's operations."""
    if takes_factors(factors):
        return CompiledShrinkage(kernels, factors, coefficients)
    return BatchedShrinkage(factors, coefficients)


def takes_factors(factors: Factors) -> bool:
    """Return whether the kernels take these factors: contiguous, in float32, on the CPU."""
    parameters = [parameter for pair in factors for parameter in pair]
    return all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)


class _FactorArguments:
    """Parameters and their gradients as the kernels take them."""

    def __init__(self, factors: Factors) -> None:
        self._factors = list(factors)
        self._sizes = torch.tensor([[len(A), A.shape[1], len(B)] for A, B in factors])

    def call(self, kernels: Kernels, name: str, weight: Tensor | float) -> Tensor:
        """Let a kernel add to the gradients; return the values that it finds, float64 of shape (matrices,)."""
        values = torch.empty(len(self._factors), dtype=torch.float64)
        columns = ([pair[place] for pair in self._factors] for place in (0, 1))
        addresses = [
            np.array(found, dtype=np.uintp)
            for parameters in columns
            for found in ([p.data_ptr() for p in parameters], [_gradient_address(p) for p in parameters])
        ]
        A, dA, B, dB = (each.ctypes.data for each in addresses)
        kernels(name, A, B, dA, dB, self._sizes, weight, values, len(self._factors))
        return values


def _gradient_address(parameter: Tensor) -> int:
    """Return where the gradient is added; 0 of a frozen parameter."""
    if not parameter.requires_grad:
        return 0
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad.data_ptr()
