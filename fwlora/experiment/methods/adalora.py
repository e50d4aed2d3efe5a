"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) within a parameter budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, cast

from pydantic import Field, model_validator

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods.base import Method, MethodSpec, Variant, peft_options, register_method
from fwlora.experiment.settings.base import Searchable, SettingsNode

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fwlora.adalora import AdaLora
    from fwlora.config import RankPlan
    from fwlora.experiment.fused.compiled import Kernels
    from fwlora.experiment.fused.compiled_terms import CompiledOrthogonality
    from fwlora.experiment.settings.schema import RunSettings


# The authors' script for SST-2: 6,000, 22,000 and 100 of 24 epochs of 2,105 steps.
PAPER_SHARES = {"tinit": 6_000 / 50_520, "tfinal": 22_000 / 50_520, "deltaT": 100 / 50_520}


class AdaLoraSettings(SettingsNode):
    """``adalora``. All keys but ``init_rank_factor`` and ``schedule`` are PEFT's own names, meanings and defaults.

    Attributes:
        init_rank_factor: the initial rank is this times the mean LoRA rank of the same budget, rounded up.
        schedule: ``peft`` takes ``tinit``, ``tfinal`` and ``deltaT`` as they are; ``proportional`` takes the shares of
            the run that they are in the authors' SST-2 run, see :data:`PAPER_SHARES`.
        tinit: optimizer steps before pruning starts.
        tfinal: optimizer steps after pruning has ended.
        deltaT: optimizer steps from one pruning to the next.
        beta1: factor of the moving average of sensitivities.
        beta2: factor of the moving average of their uncertainty.
        orth_reg_weight: of the orthogonality term; the paper's scripts use 0.1.
    """

    init_rank_factor: Annotated[float, Field(ge=1), Searchable()] = 1.5
    schedule: Literal["peft", "proportional"] = "peft"
    tinit: int = Field(default=0, ge=0)
    tfinal: int = Field(default=0, ge=0)
    deltaT: int = Field(default=1, ge=1)
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: Annotated[float, Field(ge=0), Searchable()] = 0.5

    @model_validator(mode="after")
    def _is_one_schedule(self) -> Self:
        given = sorted(PAPER_SHARES.keys() & self.model_fields_set)
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.schedule == "proportional" and changed:
            raise ValueError(f"`schedule` proportional decides {', '.join(changed)}; leave them out")
        return self

    def fit_to(self, total_steps: int) -> AdaLoraSettings:
        """Return the settings of a run of so many optimizer steps, the schedule in steps."""
        if self.schedule == "peft":
            return self
        steps = {name: round(share * total_steps) for name, share in PAPER_SHARES.items()}
        return self.model_copy(update={**steps, "deltaT": max(1, steps["deltaT"])})

    def peft_schedule(self) -> JsonObject:
        """Return the keys that PEFT's AdaLoraConfig takes."""
        return self.model_dump(exclude={"init_rank_factor", "schedule"})


class AdaLoraMethod(Method):
    """AdaLoRA in a training loop.

    Args:
        adalora: drives PEFT's allocator.
    """

    has_loss_term = True

    def __init__(self, adalora: AdaLora) -> None:
        super().__init__(adalora.pairs)
        self.adalora = adalora
        self._compiled_term: CompiledOrthogonality | None = None

    def use_kernels(self, kernels: Kernels) -> None:
        """Add the orthogonality term's gradient by a compiled kernel, where it takes the factors."""
        from fwlora.experiment.fused.compiled_terms import CompiledOrthogonality, takes_factors

        factors = [(pair.A, pair.B) for pair in self.pairs]
        if takes_factors(factors) and self.adalora.term_weight:
            self._compiled_term = CompiledOrthogonality(kernels, factors, self.adalora.term_weight)

    def loss_term(self) -> Tensor | None:
        """Return the orthogonality term, unless a kernel adds its gradient.

        See :meth:`fwlora.adalora.AdaLora.loss_term`.
        """
        return self.adalora.loss_term() if self._compiled_term is None else None

    def after_backward(self, optimizer: Optimizer) -> None:
        """Add the orthogonality term's gradient, where a kernel does."""
        if self._compiled_term is not None:
            self.adalora.last_term = self._compiled_term.add_gradients()

    def after_step(self, step: int) -> None:
        """Update scores and masks."""
        self.adalora.after_step(step)

    def step_values(self) -> Mapping[str, Tensor | float]:
        """Return the orthogonality term as ``penalty``, and ``active_rank``, the number of triplets in use."""
        return {"penalty": self.adalora.last_term, "active_rank": float(sum(self.active_ranks()))}

    def active_ranks(self) -> list[int]:
        """Return the triplets in use, one number per pair."""
        return self.adalora.active_ranks()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the triplets in use as a LoRA adapter."""
        from fwlora.adalora import save_as_lora

        save_as_lora(cast("PeftModel", model), self.pairs, folder)

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

        settings = _settings_of(run).fit_to(total_steps)
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
        settings = _settings_of(run).fit_to(total_steps)
        tinit, tfinal = settings.tinit, settings.tfinal
        if tinit >= total_steps - tfinal or total_steps - tfinal < 2:
            raise UserError(
                f"run.adalora: tinit = {tinit} and tfinal = {tfinal} of {total_steps} optimizer steps leave AdaLoRA "
                "no steps to allocate ranks in; lower them, or lower run.training.batch_size"
            )

    def rescale(self, run: RunSettings, steps: int, new_steps: int) -> RunSettings:
        """Keep the share of the steps before pruning and after it."""
        if _settings_of(run).schedule == "proportional":
            return run
        tinit, tfinal = _settings_of(run).tinit, _settings_of(run).tfinal
        if tinit >= steps - tfinal:
            raise ValueError(f"tinit {tinit} and tfinal {tfinal} leave no step of the run's {steps}")
        new_final = min(int(tfinal * new_steps / steps), new_steps - 2)
        new_init = min(int(tinit * new_steps / steps), new_steps - new_final - 1)
        return run.with_method_settings(tinit=new_init, tfinal=new_final)

    def limit_to_trial(self, run: RunSettings) -> RunSettings:
        """Prune from the first step on, at every step."""
        return run.with_method_settings(schedule="peft", tinit=0, tfinal=0, deltaT=1)

    def changes_ranks(self, run: RunSettings) -> bool:
        """Return True: it prunes triplets by their importance."""
        return True


def _settings_of(run: RunSettings) -> AdaLoraSettings:
    settings = run.method_settings
    assert isinstance(settings, AdaLoraSettings)
    return settings


register_method(AdaLoraSpec())
