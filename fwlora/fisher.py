"""Squared gradient norms of frozen weight matrices, measured without giving any of them a gradient.

For an adapted module with input X (T, d_in) and gradient G (T, d_out) of the loss at its output, the gradient of its
frozen weight is G^T X. Both pass by during the backward pass; autograd is never asked for the weight's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GradientRecorder:
    """Sums G^T X per module over all backward passes until it is read.

    G is taken at the output of the adapted module: at the base layer alone, autograd computes no gradient where the
    input needs none, which would miss the first layer's projections. Under gradient checkpointing the first,
    gradient-free forward is passed over.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._products: list[Tensor | None] = [None] * len(modules)
        self._handles = [module.register_forward_hook(self._make_hook(index)) for index, module in enumerate(modules)]

    def observe(self, index: int, inputs: Tensor, output_gradient: Tensor) -> None:
        """Adds one pass of module ``index``: X (..., d_in) and G (..., d_out).

        The entry for paths that bypass module hooks (a fused adapter layer): they call this themselves.
        """
        dtype = torch.promote_types(output_gradient.dtype, torch.float32)
        X = inputs.detach().flatten(0, -2).to(dtype)
        G = output_gradient.detach().flatten(0, -2).to(dtype)
        with torch.autocast(X.device.type, enabled=False):
            product = G.T @ X
        previous = self._products[index]
        self._products[index] = product if previous is None else previous.add_(product)

    def take_squared_norms(self) -> Tensor:
        """||sum of G^T X||_F^2 per module, shape (modules,), and forgets the sums.

        Raises:
            RuntimeError: some module saw no backward pass since the last call.
        """
        missing = sum(product is None for product in self._products)
        if missing:
            raise RuntimeError(
                f"{missing} of {len(self._products)} adapted modules saw no backward pass since the last step(); "
                "call it once after loss.backward() and before optimizer.step()"
            )
        norms = torch.stack([product.square().sum() for product in self._products if product is not None])
        self._products = [None] * len(self._products)
        return norms

    def close(self) -> None:
        """Removes the hooks; the modules are as before."""
        for handle in self._handles:
            handle.remove()
        self._products = [None] * len(self._products)

    def _make_hook(self, index: int) -> Any:
        def record_forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not (module.training and torch.is_grad_enabled() and output.requires_grad):
                return
            inputs = args[0]
            output.register_hook(lambda gradient: self.observe(index, inputs, gradient))

        return record_forward


class FisherAccumulator:
    """F_m <- beta F_m + (1 - beta) ||grad W_m||_F^2, one update per optimiser step.

    Args:
        count: matrices.
        decay: beta in [0, 1).
        device: where F lives; updates cause no transfer.
        dtype: of F.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    def __init__(
        self, count: int, decay: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` is {decay}; an averaging factor is at least 0 and below 1")
        self.decay = decay
        self.steps = 0
        self.values = torch.zeros(count, device=device, dtype=dtype)

    def update(self, squared_norms: Tensor) -> None:
        """Takes one step's squared gradient norms, shape (matrices,)."""
        self.values.lerp_(squared_norms.to(self.values), 1 - self.decay)
        self.steps += 1
