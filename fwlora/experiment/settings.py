"""Settings of one run: resolved and validated once, all errors in one message, plain typed objects after that."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fwlora.experiment.errors import UserError

FORBIDDEN_IN_RUN_IDS = set('":<>|*?/\\\r\n')

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
    """``training``. ``warmup_ratio`` is the learning rate's warm-up, not the Fisher warm-up."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    optimizer: Literal["adamw"]
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ]
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
    """``fw_lora``. ``warmup_steps`` is the Fisher warm-up, in optimiser steps."""

    lambda_fw: float = Field(ge=0)
    warmup_steps: int = Field(ge=1)
    fisher_alpha: Fraction
    estimator: Literal["exact"]
    importance: Literal["sum", "max", "mean", "none"]


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


class LogUniform(_Settings):
    type: Literal["loguniform"]
    low: float = Field(gt=0)
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        return _check_order(self)


class Uniform(_Settings):
    type: Literal["uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        return _check_order(self)


class IntRange(_Settings):
    type: Literal["int"]
    low: int
    high: int
    step: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        return _check_order(self)


class Categorical(_Settings):
    type: Literal["categorical"]
    choices: list[int | float | str | bool] = Field(min_length=1)


def _check_order(distribution: Any) -> Any:
    if distribution.low >= distribution.high:
        raise ValueError(f"`low` {distribution.low} must be below `high` {distribution.high}")
    return distribution


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
    """``engine``. ``fast`` false does what the files literally say: every batch padded to ``max_length``."""

    fast: bool
    device: Literal["auto", "cpu", "cuda"]


class ProgramSettings(_Settings):
    """Everything that a started program was told."""

    run: RunSettings
    results_dir: str
    mode: Literal["trial", "full"]
    wandb: WandbSettings
    engine: EngineSettings


TRIAL_BATCHES = 2


def resolve_settings(
    composed: Mapping[str, Any], *, file_id: str, file_seed: int | None, defaults: Mapping[str, Any]
) -> ProgramSettings:
    """Validates the composed configuration and applies what follows from it.

    A seed other than the file's is added to the run id, so that two seeds never share a folder or a W&B run; nodes of
    other methods are dropped; trial mode is limited.

    Args:
        composed: the configuration as plain containers.
        file_id: which run file was selected.
        file_seed: the seed that the file itself states.
        defaults: the content of ``config.yaml``.

    Raises:
        UserError: every unknown key, wrong type and refused value, each with its key path.
    """
    composed = {key: value for key, value in composed.items() if key != "hydra"}
    run = dict(composed.get("run") or {})
    problems = _drop_foreign_nodes(run, defaults["run"])
    if run.get("optuna"):
        run["optuna"] = _normalise_search_space(run["optuna"])
    seed = (run.get("training") or {}).get("seed")
    run_id = run.get("run_id")
    if isinstance(run_id, str) and seed != file_seed and not run_id.endswith(f"-s{seed}"):
        run["run_id"] = f"{run_id}-s{seed}"
    # Pipelines may pass `results_dir=` with nothing behind it; that means the default.
    composed["results_dir"] = composed.get("results_dir") or defaults["results_dir"]
    try:
        settings = ProgramSettings.model_validate({**composed, "run": run})
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
        raise UserError.collect(f"config/runs/{file_id}.yaml and its overrides", problems) from None
    if problems:
        raise UserError.collect(f"config/runs/{file_id}.yaml and its overrides", problems)
    return limit_to_trial(settings) if settings.mode == "trial" else settings


def limit_to_trial(settings: ProgramSettings) -> ProgramSettings:
    """Trial mode: one epoch of two batches, W&B disabled, no search; every path of a full run is still taken."""
    run = settings.run
    batch_size = run.training.batch_size
    limits: dict[str, Any] = {
        "training": run.training.model_copy(update={"epochs": 1, "gradient_accumulation_steps": 1}),
        "dataset": run.dataset.model_copy(
            update={"train_examples": TRIAL_BATCHES * batch_size, "eval_examples": TRIAL_BATCHES * batch_size}
        ),
        "optuna": run.optuna.model_copy(update={"n_trials": 0}),
    }
    if run.fw_lora:
        limits["fw_lora"] = run.fw_lora.model_copy(update={"warmup_steps": 1})
    if run.adalora:
        limits["adalora"] = run.adalora.model_copy(update={"tinit": 0, "tfinal": 0, "deltaT": 1})
    return settings.model_copy(
        update={
            "run": run.model_copy(update=limits),
            "wandb": settings.wandb.model_copy(update={"mode": "disabled", "required": False}),
        }
    )


def check_fisher_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """A warning where the Fisher warm-up takes more than half of the run.

    Raises:
        UserError: the warm-up never ends, so that FW-LoRA would silently be LoRA.
    """
    if warmup_steps >= total_steps:
        raise UserError(
            f"run.fw_lora.warmup_steps is {warmup_steps}, but the run has {total_steps} optimiser steps: importances "
            f"would never be used and FW-LoRA would be LoRA; set run.fw_lora.warmup_steps below {total_steps}"
        )
    if 2 * warmup_steps > total_steps:
        return (
            f"warning: the Fisher warm-up takes {warmup_steps} of {total_steps} optimiser steps; "
            "shrinkage acts in less than half of the run"
        )
    return None


def _drop_foreign_nodes(run: dict[str, Any], run_defaults: Mapping[str, Any]) -> list[str]:
    problems = []
    for node, method in METHOD_NODES.items():
        if run.get("method") == method or node not in run:
            continue
        given = run.pop(node) or {}
        default = run_defaults.get(node) or {}
        changed = sorted(key for key, value in given.items() if key not in default or default[key] != value)
        problems += [
            f"run.{node}.{key} = {given[key]!r} is read by {method} only, not by {run.get('method')}" for key in changed
        ]
    return problems


def _normalise_search_space(optuna: Mapping[str, Any]) -> dict[str, Any]:
    space = optuna.get("search_space") or {}
    if not isinstance(space, Mapping):
        return dict(optuna)
    # First-generation pipelines write the key `type` as `distribution_type` in some files.
    renamed = {
        name: {("type" if key == "distribution_type" else key): value for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for name, entry in space.items()
    }
    return {**optuna, "search_space": renamed}


def _describe(item: Any) -> str:
    """One line for one pydantic error: key path, value, what is accepted."""
    tags = {"loguniform", "uniform", "int", "categorical"}
    parts = [str(part) for part in item["loc"]]
    if "search_space" in parts:
        after = parts.index("search_space") + 2
        parts = parts[:after] + [part for part in parts[after:] if part not in tags]
    path = ".".join(parts) or "settings"
    if item["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}" if known else ""
        return f"{path}: unknown key" + (f"; {hint}" if hint else "")
    if item["type"] == "missing":
        return f"{path}: missing"
    if item["type"] == "union_tag_invalid":
        return f"{path}.type = {item['ctx']['tag']!r}: choose one of {', '.join(sorted(tags))}"
    if item["type"] == "union_tag_not_found":
        return f"{path}.type: missing; choose one of {', '.join(sorted(tags))}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(parents: list[str]) -> list[str]:
    model: Any = ProgramSettings
    for part in parents:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
