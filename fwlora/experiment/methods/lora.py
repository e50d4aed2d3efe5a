"""LoRA with uniform ranks (Hu et al., 2021, arXiv 2106.09685), or the head alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwlora.experiment.methods.base import MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import RunSettings


class LoraSpec(MethodSpec):
    """Plain LoRA."""

    name = "baseline_lora"
    variants = (Variant("lora", "LoRA", "baseline", 0),)

    def variant(self, run: RunSettings) -> Variant:
        """LoRA, a baseline."""
        return self.variants[0]


register_method(LoraSpec())
