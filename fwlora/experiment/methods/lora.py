"""LoRA with uniform ranks (Hu et al., 2021, arXiv 2106.09685), or the head alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fwlora.experiment.methods.base import Method, MethodSpec, Variant, peft_options, register_method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fwlora.config import RankPlan
    from fwlora.experiment.settings.schema import RunSettings


class LoraMethod(Method):
    """LoRA in a training loop, or the head alone where there is no pair: every default of :class:`Method`."""


class LoraSpec(MethodSpec):
    """Plain LoRA."""

    name = "baseline_lora"
    variants = (Variant("lora", "LoRA", "baseline", 0),)

    def variant(self, run: RunSettings) -> Variant:
        """Return LoRA, a baseline."""
        return self.variants[0]

    def attach(
        self,
        model: nn.Module,
        plan: RankPlan,
        run: RunSettings,
        *,
        head_modules: Sequence[str],
        total_steps: int,
        device: torch.device,
    ) -> tuple[nn.Module, Method]:
        """Add PEFT's LoRA layers of the planned ranks."""
        from fwlora.adapters import find_adapter_pairs
        from fwlora.config import attach_lora

        adapted = attach_lora(model, plan.ranks, **peft_options(run, head_modules)).to(device)
        return adapted, LoraMethod(find_adapter_pairs(adapted))


register_method(LoraSpec())
