"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) within a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fwlora.experiment.methods.base import Method, MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from torch import Tensor

    from fwlora.adalora import AdaLora
    from fwlora.experiment.settings.schema import RunSettings


class AdaLoraMethod(Method):
    """AdaLoRA in a training loop.

    Args:
        adalora: drives PEFT's allocator.
    """

    has_loss_term = True

    def __init__(self, adalora: AdaLora) -> None:
        super().__init__(adalora.pairs)
        self.adalora = adalora

    def loss_term(self) -> Tensor | None:
        """Return the orthogonality term; see :meth:`fwlora.adalora.AdaLora.loss_term`."""
        return self.adalora.loss_term()

    def after_step(self, step: int) -> None:
        """Update scores and masks."""
        self.adalora.after_step(step)

    def step_values(self) -> Mapping[str, Tensor | float]:
        """Return the orthogonality term as ``penalty``, and ``active_rank``, the number of triplets in use."""
        return {"penalty": self.adalora.last_term, "active_rank": float(sum(self.active_ranks()))}

    def active_ranks(self) -> list[int]:
        """Return the triplets in use, one number per pair."""
        return self.adalora.active_ranks()

    def state_dict(self) -> dict[str, Any]:
        """Return scores and masks."""
        return self.adalora.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.adalora.load_state_dict(state)


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
