"""Fisher-weighted shrinkage as one object that a training loop holds."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from fwlora.adapters import AdapterPair, delta_norms, find_adapter_pairs
from fwlora.fisher import FisherAccumulator, GradientRecorder
from fwlora.importance import NORMALISATIONS, Normalisation, normalise_importance
from fwlora.shrinkage import shrinkage_gradients, shrinkage_penalty


class FisherWeightedLora:
    r"""Measures importances during the warm-up, then shrinks the updates of matrices that matter little.

    .. math:: L = L_{task} + \lambda \sum_m (1 - I_m) \lVert \Delta W_m \rVert_F^2

    Usage: ``loss.backward(); fw.step(); optimizer.step()``. The first ``warmup_steps`` calls accumulate
    F_m <- beta F_m + (1 - beta) ||grad W_m||_F^2 and leave the gradients alone; the last of them freezes
    I_m = F_m / sum F. Every later call adds the shrinkage term's gradient to the adapters' gradients, which equals
    having added the term to the loss of that step. Call it once per optimiser step, after the last ``backward()`` of a
    gradient accumulation, on unscaled gradients and before clipping, so that clipping sees the whole gradient.

    The measured gradients are those of the loss as it was back-propagated: with gradient accumulation, sums over
    micro-batches are formed before the norm, so a loss that is averaged properly gives the value of the joint batch.

    Args:
        model: a PEFT model with LoRA adapters.
        strength: lambda >= 0.
        warmup_steps: optimiser steps of measuring, >= 1.
        decay: beta in [0, 1).
        normalisation: how F becomes I, see :func:`fwlora.importance.normalise_importance`.
        adapter_name: which adapter.

    Raises:
        ValueError: no such adapter, or an argument outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1e-4,
        warmup_steps: int = 500,
        decay: float = 0.98,
        normalisation: Normalisation = "sum",
        adapter_name: str = "default",
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"`strength` is {strength}; lambda must be at least 0")
        if warmup_steps < 1:
            raise ValueError(f"`warmup_steps` is {warmup_steps}; importances need at least one step of measuring")
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"`normalisation` is {normalisation!r}; choose one of {', '.join(NORMALISATIONS)}")
        self.pairs: list[AdapterPair] = find_adapter_pairs(model, adapter_name)
        self.strength = strength
        self.warmup_steps = warmup_steps
        self.normalisation: Normalisation = normalisation
        device, dtype = self.pairs[0].A.device, torch.promote_types(self.pairs[0].A.dtype, torch.float32)
        self.fisher = FisherAccumulator(len(self.pairs), decay, device, dtype)
        self.recorder: GradientRecorder | None = GradientRecorder([pair.module for pair in self.pairs])
        self.last_penalty: Tensor = torch.zeros((), device=device, dtype=dtype)
        self._importance: Tensor | None = None
        self._groups = self._group_by_shape()
        self._coefficients: dict[tuple[torch.Size, torch.Size], Tensor] = {}

    @property
    def in_warmup(self) -> bool:
        """Whether the next :meth:`step` measures."""
        return self._importance is None

    @torch.no_grad()
    def step(self) -> None:
        """Once between ``backward()`` and ``optimizer.step()``: measure, or add the shrinkage gradient.

        Raises:
            RuntimeError: called before any backward pass.
        """
        if self.recorder is not None:
            self.fisher.update(self.recorder.take_squared_norms())
            if self.fisher.steps == self.warmup_steps:
                self._freeze()
            return
        self.last_penalty = self._add_shrinkage_gradients()

    def penalty(self) -> Tensor:
        """The differentiable term lambda sum_m (1 - I_m) ||dW_m||_F^2; 0 during the warm-up."""
        if self._importance is None:
            return torch.zeros_like(self.last_penalty)
        factors = [pair.factors() for pair in self.pairs]
        return shrinkage_penalty(factors, [pair.scaling for pair in self.pairs], 1 - self._importance, self.strength)

    def importance(self) -> dict[str, float]:
        """Frozen I_m by module name.

        Raises:
            RuntimeError: still in the warm-up.
        """
        if self._importance is None:
            raise RuntimeError(
                f"importances are frozen after {self.warmup_steps} steps; {self.fisher.steps} have been measured"
            )
        return dict(zip([pair.name for pair in self.pairs], self._importance.tolist(), strict=True))

    def norms(self) -> dict[str, float]:
        """||dW_m||_F by module name."""
        return dict(zip([pair.name for pair in self.pairs], delta_norms(self.pairs).tolist(), strict=True))

    def _freeze(self) -> None:
        self._importance = normalise_importance(self.fisher.values, self.normalisation)
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
        for shape, indices in self._groups.items():
            weights = 1 - self._importance[indices]
            scalings = weights.new_tensor([self.pairs[index].scaling for index in indices])
            self._coefficients[shape] = self.strength * weights * scalings.square()

    def _group_by_shape(self) -> dict[tuple[torch.Size, torch.Size], list[int]]:
        groups: dict[tuple[torch.Size, torch.Size], list[int]] = defaultdict(list)
        for index, pair in enumerate(self.pairs):
            groups[pair.A.shape, pair.B.shape].append(index)
        return dict(groups)

    def _add_shrinkage_gradients(self) -> Tensor:
        value = torch.zeros_like(self.last_penalty)
        for shape, indices in self._groups.items():
            A = torch.stack([self.pairs[index].A for index in indices])
            B = torch.stack([self.pairs[index].B for index in indices])
            coefficients = self._coefficients[shape].to(A.dtype)
            gradient_A, gradient_B, group_value = shrinkage_gradients(A, B, coefficients)
            value += group_value
            for index, for_A, for_B in zip(indices, gradient_A, gradient_B, strict=True):
                _add_gradient(self.pairs[index].A, for_A)
                _add_gradient(self.pairs[index].B, for_B)
        return value


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.clone()
    else:
        parameter.grad.add_(gradient)
