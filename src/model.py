"""Models: a pretrained encoder with a classification head, adapted by LoRA, AdaLoRA or FW-LoRA within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fwlora.adapters import (
    TargetModuleError,
    encoder_parameter_count,
    find_adapter_pairs,
    find_target_matrices,
    head_module_names,
)
from fwlora.budget import BudgetError, adapter_cost
from fwlora.config import FisherWeighting, RankPlan, plan_ranks
from fwlora.experiment.errors import UserError
from fwlora.experiment.modeling.pretrained import fetching, fingerprint_weights, resolve_pretrained
from fwlora.experiment.settings.schema import ModelSettings, RunSettings
from fwlora.experiment.tracking import metrics
from fwlora.methods import AdaLora, FwLora, Method, PlainLora, attach_adalora, attach_lora, plan_adalora
from fwlora.regularizer import FisherWeightedLora

CACHE_DIR = ".cache/"
# transformers makes up an empty tokenizer for a folder without any of these.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.*",
    "spm.*",
)
WEIGHT_FILES = ("*.safetensors*", "*.bin*")
# Families with absolute positions, and how many of them come before the first token's.
POSITIONS_BEFORE_TEXT = {
    "bert": 0, "distilbert": 0, "electra": 0, "albert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2,
}  # fmt: skip
PRETRAINED = "run.model.pretrained_id"
# Adapters are initialised from a stream of their own, so that heads do not depend on what a method draws.
ADAPTER_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class AdaptedModel:
    """A model ready to train, its method, how many parameters it has, and which encoder weights it started from."""

    model: nn.Module
    method: Method
    counts: dict[str, float]
    encoder_fingerprint: str


def plan_adapters(settings: ModelSettings) -> RankPlan:
    """Solves the ranks on a weightless copy of the model; only its configuration is fetched.

    Raises:
        UserError: a model that cannot be fetched, targets that match nothing, a budget too small for any rank.
    """
    config = _load_config(settings)
    with fetching(settings.pretrained_id, PRETRAINED), torch.device("meta"):
        _require_file(Path(resolve_pretrained(settings.pretrained_id, PRETRAINED)), WEIGHT_FILES, "weights")
        model = AutoModelForSequenceClassification.from_config(config)
    try:
        if settings.budget_mode == "rank":
            matrices = find_target_matrices(model, settings.lora.target_modules)
            ranks = {matrix.name: settings.lora.rank for matrix in matrices}
            return RankPlan(matrices, ranks, encoder_parameter_count(model), adapter_cost(matrices, ranks))
        return plan_ranks(model, settings.parameter_budget_percent, settings.lora.target_modules)
    except TargetModuleError as error:
        raise UserError(f"run.model.lora.target_modules: {error}") from None
    except BudgetError as error:
        raise UserError(f"run.model.parameter_budget_percent: {error}") from None


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be fetched.
    """
    with fetching(settings.pretrained_id, PRETRAINED):
        source = resolve_pretrained(settings.pretrained_id, PRETRAINED)
        _require_file(Path(source), TOKENIZER_FILES, "a tokenizer")
        return AutoTokenizer.from_pretrained(source, revision=settings.revision, cache_dir=CACHE_DIR)


def build_model(
    run: RunSettings, plan: RankPlan, num_classes: int, pad_token_id: int, total_steps: int, device: torch.device
) -> AdaptedModel:
    """Loads the encoder and attaches the run's method.

    For equal seeds every method has the same head, and LoRA and FW-LoRA the same adapters.

    Args:
        num_classes: outputs of the head.
        pad_token_id: what batches are padded with; models that classify by the last token look for it.
        total_steps: optimiser steps of the training to come; AdaLoRA's schedule and the Fisher warm-up need them.

    Raises:
        UserError: weights that cannot be fetched, or a schedule that does not fit ``total_steps``.
    """
    torch.manual_seed(run.training.seed)
    model, missing = _load_pretrained(run.model, num_classes)
    model.config.pad_token_id = pad_token_id
    try:
        heads = head_module_names(model, missing)
    except ValueError as error:
        where = f"run.model.pretrained_id = {run.model.pretrained_id!r}"
        raise UserError(f"{where}: its weights do not fit {type(model).__name__}: {error}") from None
    total = sum(p.numel() for p in model.parameters())
    fingerprint = fingerprint_weights(model, heads)
    torch.manual_seed(run.training.seed + ADAPTER_SEED_OFFSET)
    adapted, method = _attach(model, run, plan, heads, total_steps, device)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapters = sum(p.numel() for pair in method.pairs for p in (pair.A, pair.B, pair.E) if p is not None)
    counts = {
        metrics.PARAMS_ADAPTER: adapters,
        metrics.PARAMS_HEAD: trainable - adapters,
        metrics.PARAMS_TRAINABLE: trainable,
        metrics.PARAMS_ENCODER: plan.encoder_parameters,
        metrics.PARAMS_TOTAL: total + adapters,
        metrics.BUDGET_PARAMETERS: plan.budget,
    }
    return AdaptedModel(adapted, method, counts, fingerprint)


def final_adapter_parameters(method: Method) -> int:
    """Adapter parameters still in use: for AdaLoRA those of the triplets that were not pruned."""
    ranks = method.module_table()["ranks"]
    return sum(
        rank * (pair.A.shape[1] + pair.B.shape[0] + (pair.E is not None))
        for rank, pair in zip(ranks, method.pairs, strict=True)
    )


def _attach(
    model: nn.Module, run: RunSettings, plan: RankPlan, heads: list[str], total_steps: int, device: torch.device
) -> tuple[nn.Module, PlainLora | FwLora | AdaLora]:
    lora = run.model.lora
    if not lora.enabled:
        model.requires_grad_(False)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        return model.to(device), PlainLora([])
    options: dict[str, Any] = {
        "scaling": lora.scaling,
        "dropout": lora.dropout,
        "head_modules": heads,
        "task_type": "SEQ_CLS",
    }
    if run.method == "adalora":
        assert run.adalora is not None
        try:
            adalora_plan = plan_adalora(plan.matrices, plan.budget, plan.mean_rank, run.adalora.init_rank_factor)
            schedule = run.adalora.peft_schedule()
            adapted = attach_adalora(
                model, plan.matrices, adalora_plan, total_steps=total_steps, schedule=schedule, **options
            ).to(device)
            return adapted, AdaLora(adapted, adalora_plan)
        except ValueError as error:
            raise UserError(f"run.adalora with {total_steps} optimiser steps: {error}") from None
    adapted = attach_lora(model, plan.ranks, **options).to(device)
    if run.method == "baseline_lora":
        return adapted, PlainLora(find_adapter_pairs(adapted))
    assert run.fw_lora is not None
    options = FisherWeighting(
        strength=run.fw_lora.lambda_fw,
        warmup_steps=run.fw_lora.warmup_steps,
        decay=run.fw_lora.fisher_alpha,
        estimator=run.fw_lora.estimator,
        sketch_size=run.fw_lora.sketch_size,
        fisher_every=run.fw_lora.fisher_every,
        importance=run.fw_lora.importance,
        allocation=run.fw_lora.allocation,
        max_rank_factor=run.fw_lora.max_rank_factor,
        seed=run.training.seed,
    )
    return adapted, FwLora(FisherWeightedLora(adapted, options))


def check_max_length(settings: ModelSettings, max_length: int) -> None:
    """Refuses texts longer than the encoder has positions for.

    Raises:
        UserError: ``max_length`` is above them.
    """
    config = _load_config(settings)
    if config.model_type not in POSITIONS_BEFORE_TEXT:
        return
    limit = config.max_position_embeddings - POSITIONS_BEFORE_TEXT[config.model_type]
    if max_length > limit:
        raise UserError(
            f"run.dataset.max_length = {max_length}: {settings.pretrained_id} has positions for {limit} tokens; "
            f"use at most {limit}"
        )


def _require_file(folder: Path, patterns: tuple[str, ...], what: str) -> None:
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise OSError(f"{folder} holds no file of {what}: none of {', '.join(patterns)}")


def _load_config(settings: ModelSettings, **options: Any) -> Any:
    with fetching(settings.pretrained_id, PRETRAINED):
        source = resolve_pretrained(settings.pretrained_id, PRETRAINED)
        return AutoConfig.from_pretrained(source, revision=settings.revision, cache_dir=CACHE_DIR, **options)


def _load_pretrained(settings: ModelSettings, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The model in float32 and the names of parameters that its checkpoint does not have."""
    config = _load_config(settings, num_labels=num_classes)
    with fetching(settings.pretrained_id, PRETRAINED):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve_pretrained(settings.pretrained_id, PRETRAINED),
            config=config,
            revision=settings.revision,
            cache_dir=CACHE_DIR,
            dtype=torch.float32,
            output_loading_info=True,
        )
    return model, sorted(info["missing_keys"])
