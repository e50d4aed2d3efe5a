"""Fisher-weighted LoRA, and its control: uniform shrinkage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fwlora.experiment.methods.base import MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import RunSettings


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
