"""Fisher-weighted LoRA, and its control: uniform shrinkage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fwlora.experiment.methods.base import Method, MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from fwlora.estimators import PassEstimator
    from fwlora.experiment.settings.schema import RunSettings
    from fwlora.regularizer import FisherWeightedLora


class FwLoraMethod(Method):
    """Fisher-weighted LoRA in a training loop.

    Args:
        fisher_weighted: measures importances and shrinks updates.
    """

    def __init__(self, fisher_weighted: FisherWeightedLora) -> None:
        super().__init__(fisher_weighted.pairs)
        self.fisher_weighted = fisher_weighted

    @property
    def in_warmup(self) -> bool:
        """Whether importances are being measured."""
        return self.fisher_weighted.in_warmup

    @property
    def estimator(self) -> PassEstimator | None:
        """The estimator while this step is measured from what passes through modules."""
        return self.fisher_weighted.pass_estimator

    def after_backward(self, optimizer: Optimizer) -> None:
        """Measure, or add the shrinkage gradient."""
        self.fisher_weighted.step(optimizer)

    def step_values(self) -> Mapping[str, Tensor | float]:
        """Return the shrinkage term as ``penalty``."""
        return {"penalty": self.fisher_weighted.last_penalty}

    def importances(self) -> list[float | None]:
        """Return I_m, one per pair; None during the warm-up."""
        return super().importances() if self.in_warmup else [*self.fisher_weighted.importance().values()]

    def state_dict(self) -> dict[str, Any]:
        """Return measurements, importances and ranks; see :meth:`fwlora.FisherWeightedLora.state_dict`."""
        return {**self.fisher_weighted.state_dict(), "last_penalty": float(self.fisher_weighted.last_penalty)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load weights and the optimizer's state afterwards."""
        self.fisher_weighted.load_state_dict({key: value for key, value in state.items() if key != "last_penalty"})
        penalty = self.fisher_weighted.last_penalty
        self.fisher_weighted.last_penalty = penalty.new_tensor(state["last_penalty"])


class FwLoraSpec(MethodSpec):
    """The proposed method; with ``importance: none`` its control, which shrinks uniformly."""

    name = "proposed_fw_lora"
    variants = (
        Variant("proposed", "FW-LoRA", "proposed", 2),
        Variant("control", "uniform shrinkage", "control", 3),
    )
    claimed_settings: ClassVar[Mapping[str, str]] = {"fw_lora.importance": "sum", "fw_lora.allocation": "shrink"}
    strength_settings = ("fw_lora.lambda_fw",)
    control_settings = ("fw_lora.warmup_steps", "fw_lora.allocation")

    def variant(self, run: RunSettings) -> Variant:
        """FW-LoRA, or uniform shrinkage."""
        proposed, control = self.variants
        return control if run.fw_lora is not None and run.fw_lora.importance == "none" else proposed

    def changes_ranks(self, run: RunSettings) -> bool:
        """Only where ranks are reallocated after the Fisher warm-up."""
        return run.fw_lora is not None and run.fw_lora.allocation == "reallocate"


register_method(FwLoraSpec())
