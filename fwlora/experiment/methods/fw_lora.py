"""Fisher-weighted LoRA, and its control: uniform shrinkage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwlora.experiment.methods.base import MethodSpec, Variant, register_method

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import RunSettings


class FwLoraSpec(MethodSpec):
    """The proposed method; with ``importance: none`` its control, which shrinks uniformly."""

    name = "proposed_fw_lora"

    def variant(self, run: RunSettings) -> Variant:
        """FW-LoRA, or uniform shrinkage."""
        if run.fw_lora is not None and run.fw_lora.importance == "none":
            return Variant("control", "uniform shrinkage", "control", 3)
        return Variant("proposed", "FW-LoRA", "proposed", 2)


register_method(FwLoraSpec())
