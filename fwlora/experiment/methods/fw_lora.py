"""Fisher-weighted LoRA, and its control: uniform shrinkage."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import pydantic

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods.base import Method, MethodSpec, Variant, peft_options, register_method
from fwlora.experiment.settings.base import Searchable, SettingsNode
from fwlora.options import FisherWeighting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fwlora.config import RankPlan
    from fwlora.estimators import PassEstimator
    from fwlora.experiment.fused.compiled import Kernels
    from fwlora.experiment.settings.schema import RunSettings
    from fwlora.regularizer import FisherWeightedLora

logger = logging.getLogger(__name__)


def _run_file_name(option: Field[Any]) -> str:
    return option.metadata.get("run_file_name") or option.name


def _derive_settings() -> type[SettingsNode]:
    """Make the node ``fw_lora`` of run files from :class:`fwlora.FisherWeighting`, without its seed."""
    types = get_type_hints(FisherWeighting)
    keys: JsonObject = {}
    for option in fields(FisherWeighting):
        if option.name == "seed":
            continue
        range_ = {} if "choices" in option.metadata else {"ge": option.metadata["ge"], "lt": option.metadata["lt"]}
        if range_.get("lt") == math.inf:
            del range_["lt"]
        required = option.metadata.get("required", False)
        field = pydantic.Field(... if required else option.default, description=option.metadata["help"], **range_)
        marks = (field, Searchable()) if required else (field,)
        keys[_run_file_name(option)] = Annotated[types[option.name], *marks]
    return pydantic.create_model("FwLoraSettings", __base__=SettingsNode, __doc__="``fw_lora``.", **keys)


FwLoraSettings = _derive_settings()


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
        """The estimator while this step is measured in the passes through modules."""
        return self.fisher_weighted.pass_estimator

    def after_backward(self, optimizer: Optimizer) -> None:
        """Measure, or add the shrinkage gradient."""
        self.fisher_weighted.step(optimizer)

    def use_kernels(self, kernels: Kernels) -> None:
        """Measure, and add the shrinkage gradient, by compiled kernels."""
        from fwlora.experiment.fused.compiled_sketch import CompiledSketchProducts
        from fwlora.experiment.fused.compiled_terms import make_shrinkage

        self.fisher_weighted.make_shrinkage = partial(make_shrinkage, kernels)
        self.fisher_weighted.sketch_products = CompiledSketchProducts(kernels)

    def step_values(self) -> Mapping[str, Tensor | float]:
        """Return the shrinkage term as ``penalty``."""
        return {"penalty": self.fisher_weighted.last_penalty}

    def importances(self) -> list[float | None]:
        """Return I_m, one per pair; None during the warm-up."""
        return super().importances() if self.in_warmup else [*self.fisher_weighted.importance().values()]

    def state_dict(self) -> JsonObject:
        """Return measurements, importances and ranks; see :meth:`fwlora.FisherWeightedLora.state_dict`."""
        return {**self.fisher_weighted.state_dict(), "last_penalty": float(self.fisher_weighted.last_penalty)}

    def load_state_dict(self, state: JsonMapping) -> None:
        """Continue where :meth:`state_dict` was taken; load weights and the optimizer's state afterwards."""
        self.fisher_weighted.load_state_dict({key: value for key, value in state.items() if key != "last_penalty"})
        penalty = self.fisher_weighted.last_penalty
        self.fisher_weighted.last_penalty = penalty.new_tensor(state["last_penalty"])


class FwLoraSpec(MethodSpec):
    """The proposed method; with ``importance: none`` its control, which shrinks uniformly."""

    name = "proposed_fw_lora"
    settings_node = "fw_lora"
    Settings = FwLoraSettings
    variants = (
        Variant("proposed", "FW-LoRA", "proposed", 2),
        Variant("control", "uniform shrinkage", "control", 3),
    )
    claimed_settings: ClassVar[Mapping[str, str]] = {"fw_lora.importance": "sum", "fw_lora.allocation": "shrink"}
    strength_settings = ("fw_lora.lambda_fw",)
    control_settings = ("fw_lora.warmup_steps", "fw_lora.allocation")

    def variant(self, run: RunSettings) -> Variant:
        """Return FW-LoRA, or uniform shrinkage."""
        proposed, control = self.variants
        return control if run.method_settings and weighting_of(run).importance == "none" else proposed

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
        """Add the adapters of plain LoRA, and shrink their updates by importance after the Fisher warm-up."""
        from fwlora.config import attach_lora
        from fwlora.regularizer import FisherWeightedLora

        adapted = attach_lora(model, plan.ranks, **peft_options(run, head_modules)).to(device)
        return adapted, FwLoraMethod(FisherWeightedLora(adapted, weighting_of(run)))

    def check(self, run: RunSettings, total_steps: int) -> None:
        """Check that the Fisher warm-up ends, since FW-LoRA is plain LoRA until then; warn if it takes over half."""
        warmup_steps = weighting_of(run).warmup_steps
        if total_steps < 2:
            raise UserError(
                "the run has one optimizer step, and FW-LoRA needs one to measure and one to shrink; lower "
                "run.training.batch_size or raise run.training.epochs"
            )
        if warmup_steps >= total_steps:
            raise UserError(
                f"run.fw_lora.warmup_steps is {warmup_steps}, but the run has {total_steps} optimizer steps: "
                "importances would never be used and FW-LoRA would be LoRA; set run.fw_lora.warmup_steps below "
                f"{total_steps}, or lower run.training.batch_size"
            )
        if 2 * warmup_steps > total_steps:
            logger.warning(
                "warning: the Fisher warm-up takes %d of %d optimizer steps; "
                "shrinkage acts in less than half of the run",
                warmup_steps,
                total_steps,
            )

    def rescale(self, run: RunSettings, steps: int, new_steps: int) -> RunSettings:
        """Keep the Fisher warm-up's share of the steps."""
        warmup_steps = weighting_of(run).warmup_steps
        if warmup_steps >= steps:
            raise ValueError(f"warmup_steps {warmup_steps} >= the run's {steps} steps")
        return run.with_method_settings(
            warmup_steps=min(max(1, round(warmup_steps * new_steps / steps)), new_steps - 1)
        )

    def limit_to_trial(self, run: RunSettings) -> RunSettings:
        """Measure in the first step and shrink in the second."""
        return run.with_method_settings(warmup_steps=1)

    def changes_ranks(self, run: RunSettings) -> bool:
        """Return whether ranks are reallocated after the Fisher warm-up."""
        return run.method_settings is not None and weighting_of(run).allocation == "reallocate"


def weighting_of(run: RunSettings) -> FisherWeighting:
    """Return the options of the method that a run's settings name, with the run's seed."""
    assert run.method_settings is not None
    given = dict(run.method_settings)
    options = {
        option.name: given[_run_file_name(option)]
        for option in fields(FisherWeighting)
        if _run_file_name(option) in given
    }
    return FisherWeighting(**options, seed=run.training.seed)


register_method(FwLoraSpec())
