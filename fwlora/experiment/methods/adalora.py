"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) within a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods.base import Method, MethodSpec, Variant, peft_options, register_method
from fwlora.experiment.settings.base import Searchable, SettingsNode

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fwlora.adalora import AdaLora
    from fwlora.config import RankPlan
    from fwlora.experiment.settings.schema import RunSettings


class AdaLoraSettings(SettingsNode):
    """``adalora``. All keys but ``init_rank_factor`` are PEFT's own names, meanings and defaults.

    Attributes:
        init_rank_factor: the initial rank is this times the mean LoRA rank of the same budget, rounded up.
        tinit: optimizer steps before pruning starts.
        tfinal: optimizer steps after pruning has ended.
        deltaT: optimizer steps from one pruning to the next.
        beta1: factor of the moving average of sensitivities.
        beta2: factor of the moving average of their uncertainty.
        orth_reg_weight: of the orthogonality term; the paper's scripts use 0.1.
    """

    init_rank_factor: Annotated[float, Field(ge=1), Searchable()] = 1.5
    tinit: int = Field(default=0, ge=0)
    tfinal: int = Field(default=0, ge=0)
    deltaT: int = Field(default=1, ge=1)
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: Annotated[float, Field(ge=0), Searchable()] = 0.5

    def peft_schedule(self) -> JsonObject:
        """Return the keys that PEFT's AdaLoraConfig takes."""
        return self.model_dump(exclude={"init_rank_factor"})


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

    def state_dict(self) -> JsonObject:
        """Return scores and masks."""
        return self.adalora.state_dict()

    def load_state_dict(self, state: JsonMapping) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.adalora.load_state_dict(state)


class AdaLoraSpec(MethodSpec):
    """PEFT's AdaLoRA with its schedule driven to the budget."""

    name = "adalora"
    settings_node = "adalora"
    Settings = AdaLoraSettings
    variants = (Variant("adalora", "AdaLoRA", "baseline", 1),)

    def variant(self, run: RunSettings) -> Variant:
        """Return AdaLoRA, a baseline."""
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
        """Add PEFT's triplets, so many that those left after pruning use the budget."""
        from fwlora.adalora import AdaLora, attach_adalora, plan_adalora

        settings = _settings_of(run)
        try:
            adalora_plan = plan_adalora(plan.matrices, plan.budget, plan.mean_rank, settings.init_rank_factor)
            adapted = attach_adalora(
                model,
                plan.matrices,
                adalora_plan,
                total_steps=total_steps,
                schedule=settings.peft_schedule(),
                **peft_options(run, head_modules),
            ).to(device)
            return adapted, AdaLoraMethod(AdaLora(adapted, adalora_plan))
        except ValueError as error:
            raise UserError(f"run.adalora with {total_steps} optimizer steps: {error}") from None

    def check(self, run: RunSettings, total_steps: int) -> None:
        """Check that pruning has at least one step, and one before it."""
        tinit, tfinal = _settings_of(run).tinit, _settings_of(run).tfinal
        if tinit >= total_steps - tfinal or total_steps - tfinal < 2:
            raise UserError(
                f"run.adalora: tinit = {tinit} and tfinal = {tfinal} of {total_steps} optimizer steps leave AdaLoRA "
                "no steps to allocate ranks in; lower them, or lower run.training.batch_size"
            )

    def rescale(self, run: RunSettings, steps: int, new_steps: int) -> RunSettings:
        """Keep the share of the steps before pruning and after it."""
        tinit, tfinal = _settings_of(run).tinit, _settings_of(run).tfinal
        if tinit >= steps - tfinal:
            raise ValueError(f"tinit {tinit} and tfinal {tfinal} leave no step of the run's {steps}")
        new_final = min(int(tfinal * new_steps / steps), new_steps - 2)
        new_init = min(int(tinit * new_steps / steps), new_steps - new_final - 1)
        return run.with_method_settings(tinit=new_init, tfinal=new_final)

    def limit_to_trial(self, run: RunSettings) -> RunSettings:
        """Prune from the first step on, at every step."""
        return run.with_method_settings(tinit=0, tfinal=0, deltaT=1)

    def changes_ranks(self, run: RunSettings) -> bool:
        """Return True: it prunes triplets by their importance."""
        return True


def _settings_of(run: RunSettings) -> AdaLoraSettings:
    settings = run.method_settings
    assert isinstance(settings, AdaLoraSettings)
    return settings


register_method(AdaLoraSpec())
