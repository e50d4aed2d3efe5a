"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) within a parameter budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwlora.experiment.methods.base import MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import RunSettings


class AdaLoraSpec(MethodSpec):
    """PEFT's AdaLoRA with its schedule driven to the budget."""

    name = "adalora"
    variants = (Variant("adalora", "AdaLoRA", "baseline", 1),)

    def variant(self, run: RunSettings) -> Variant:
        """AdaLoRA, a baseline."""
        return self.variants[0]

    def changes_ranks(self, run: RunSettings) -> bool:
        """Always: it prunes triplets by their importance."""
        return True


register_method(AdaLoraSpec())
