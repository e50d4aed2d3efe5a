"""Settings as typed objects: names, types, ranges and units of everything that can be set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORBIDDEN_IN_RUN_IDS = set("\":<>|*?/\\\r\n#%;,'")
RESERVED_RUN_IDS = {".", "..", "comparison"}

MethodName = Literal["baseline_lora", "adalora", "proposed_fw_lora"]
# The node of a run that only one method reads.
METHOD_NODES: dict[str, str] = {"fw_lora": "proposed_fw_lora", "adalora": "adalora"}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class LoraSettings(_Settings):
    """``model.lora``. ``alpha / rank`` is the scaling of every method's updates."""

    enabled: bool
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: Fraction
    target_modules: list[str] = Field(min_length=1)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class ModelSettings(_Settings):
    """``model``. ``budget_mode`` says whether the parameter budget or ``lora.rank`` fixes the ranks."""

    name: str
    pretrained_id: str = Field(min_length=1)
    revision: str | None
    parameter_budget_percent: float = Field(gt=0, le=100)
    budget_mode: Literal["budget", "rank"]
    lora: LoraSettings


class DatasetSettings(_Settings):
    """``dataset``. ``train_examples`` limits training to a fixed random part, the same for every training seed."""

    name: str = Field(min_length=1)
    subset: str | None
    revision: str | None
    split: str
    eval_split: str
    max_length: int = Field(ge=2)
    padding: Literal["max_length", "longest"]
    truncation: bool
    text_columns: list[str] | None = Field(min_length=1, max_length=2)
    label_column: str
    train_examples: int | None = Field(ge=1)
    eval_examples: int | None = Field(ge=1)
    subset_seed: Seed


class TrainingSettings(_Settings):
    """``training``. ``warmup_ratio`` is the learning rate's warm-up, not the Fisher warm-up. ``lr_scheduler`` and its
    options are transformers' own names.
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    optimizer: Literal["adamw"]
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ]  # fmt: skip
    lr_scheduler_options: dict[str, int | float | str] = Field(default_factory=dict)
    warmup_ratio: Fraction
    gradient_accumulation_steps: int = Field(ge=1)
    max_gradient_norm: float | None = Field(gt=0)
    mixed_precision: Literal["bf16", "fp32"]
    seed: Seed

    def steps_per_epoch(self, examples: int) -> int:
        """Optimiser steps that one pass over ``examples`` takes."""
        return math.ceil(math.ceil(examples / self.batch_size) / self.gradient_accumulation_steps)

    def total_steps(self, examples: int) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.steps_per_epoch(examples)


class FwLoraSettings(_Settings):
    """``fw_lora``: see :class:`fwlora.FisherWeighting`. ``warmup_steps`` is the Fisher warm-up, in optimiser steps."""

    lambda_fw: float = Field(ge=0)
    warmup_steps: int = Field(ge=1)
    fisher_alpha: Fraction
    estimator: Literal["exact", "sketch", "adapter"]
    sketch_size: int = Field(ge=1)
    fisher_every: int = Field(ge=1)
    importance: Literal["sum", "max", "mean", "none"]
    allocation: Literal["shrink", "reallocate"]
    max_rank_factor: float = Field(ge=1)


class AdaLoraSettings(_Settings):
    """``adalora``. All keys but ``init_rank_factor`` are PEFT's own names and meanings; tinit and tfinal are steps."""

    init_rank_factor: float = Field(ge=1)
    tinit: int = Field(ge=0)
    tfinal: int = Field(ge=0)
    deltaT: int = Field(ge=1)
    beta1: float = Field(gt=0, lt=1)
    beta2: float = Field(gt=0, lt=1)
    orth_reg_weight: float = Field(ge=0)

    def peft_schedule(self) -> dict[str, Any]:
        """The keys that PEFT's AdaLoraConfig takes."""
        return self.model_dump(exclude={"init_rank_factor"})


class _Range(_Settings):
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"`low` {self.low} must be below `high` {self.high}")
        return self


class LogUniform(_Range):
    type: Literal["loguniform"]
    low: float = Field(gt=0)


class Uniform(_Range):
    type: Literal["uniform"]


class IntRange(_Range):
    type: Literal["int"]
    low: int
    high: int
    step: int = Field(default=1, ge=1)


class Categorical(_Settings):
    type: Literal["categorical"]
    choices: list[int | float | str | bool] = Field(min_length=1)


Distribution = Annotated[LogUniform | Uniform | IntRange | Categorical, Field(discriminator="type")]

# What a search may vary: the name in `optuna.search_space` -> where the value goes in the run node.
SEARCHABLE: dict[str, tuple[str, ...]] = {
    "learning_rate": ("training", "learning_rate"),
    "weight_decay": ("training", "weight_decay"),
    "batch_size": ("training", "batch_size"),
    "epochs": ("training", "epochs"),
    "warmup_ratio": ("training", "warmup_ratio"),
    "lora_rank": ("model", "lora", "rank"),
    "lora_alpha": ("model", "lora", "alpha"),
    "lora_dropout": ("model", "lora", "dropout"),
    "lambda_fw": ("fw_lora", "lambda_fw"),
    "warmup_steps": ("fw_lora", "warmup_steps"),
    "fisher_alpha": ("fw_lora", "fisher_alpha"),
    "init_rank_factor": ("adalora", "init_rank_factor"),
    "orth_reg_weight": ("adalora", "orth_reg_weight"),
}


class SearchSettings(_Settings):
    """``optuna``. Trials see ``train_examples`` of the training split and are scored on a held-out part of it."""

    n_trials: int = Field(ge=0)
    direction: Literal["maximize", "minimize"]
    search_space: dict[str, Distribution]
    epochs: int = Field(ge=1)
    train_examples: int | None = Field(ge=1)
    heldout_fraction: float = Field(gt=0, lt=1)
    heldout_seed: Seed
    seed: Seed


class RunSettings(_Settings):
    """The ``run`` node: everything that defines a run. Two runs with equal nodes but for id and seed are replicates."""

    run_id: str = Field(min_length=1)
    method: MethodName
    model: ModelSettings
    dataset: DatasetSettings
    training: TrainingSettings
    fw_lora: FwLoraSettings | None = None
    adalora: AdaLoraSettings | None = None
    optuna: SearchSettings

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        problems = []
        for node, method in METHOD_NODES.items():
            if self.method == method and getattr(self, node) is None:
                problems.append(f"method {method} needs the node `{node}`")
        if bad := sorted(FORBIDDEN_IN_RUN_IDS & set(self.run_id)):
            problems.append(f"`run_id` holds {bad}, which cannot stand in a folder name")
        if self.run_id in RESERVED_RUN_IDS:
            problems.append(f"`run_id` {self.run_id!r} is taken: it names a folder of the results")
        problems += _search_space_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def with_values(self, values: Mapping[str, Any]) -> RunSettings:
        """These settings with searched values put in their places, validated again.

        Args:
            values: name in :data:`SEARCHABLE` -> value.
        """
        node = self.model_dump()
        for name, value in values.items():
            *parents, key = SEARCHABLE[name]
            target = node
            for parent in parents:
                target = target[parent]
            target[key] = value
        return RunSettings.model_validate(node)


def _search_space_problems(run: RunSettings) -> list[str]:
    """Dimensions that nothing reads, and bounds that the setting itself would refuse."""
    problems = []
    for name, distribution in run.optuna.search_space.items():
        place = SEARCHABLE.get(name)
        if place is None:
            problems.append(f"`optuna.search_space.{name}` is not searchable; known: {', '.join(sorted(SEARCHABLE))}")
            continue
        section = getattr(run, place[0])
        if section is None:
            problems.append(f"`optuna.search_space.{name}` belongs to {METHOD_NODES[place[0]]}, not to {run.method}")
            continue
        for attribute in place[1:-1]:
            section = getattr(section, attribute)
        bounds = (
            distribution.choices if isinstance(distribution, Categorical) else [distribution.low, distribution.high]
        )
        for value in bounds:
            try:
                type(section).model_validate({**section.model_dump(), place[-1]: value})
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                problems.append(
                    f"`optuna.search_space.{name}` reaches {value!r}, which `{'.'.join(place)}` refuses: {reason}"
                )
    return problems


class WandbSettings(_Settings):
    """``wandb``. ``required`` turns the fall-back to offline into an error."""

    entity: str = Field(min_length=1)
    project: str = Field(min_length=1)
    mode: Literal["online", "offline", "disabled"]
    required: bool


class EngineSettings(_Settings):
    """``engine``. ``fast`` false does what the files literally say: every batch padded to ``max_length``, at random, by
    the model's own forward pass. ``cuda_graphs`` replays passes on a GPU.
    """

    fast: bool
    cuda_graphs: bool
    device: Literal["auto", "cpu", "cuda"]


class ProgramSettings(_Settings):
    """Everything that a started program was told."""

    run: RunSettings
    results_dir: str
    mode: Literal["trial", "full"]
    wandb: WandbSettings
    engine: EngineSettings
