"""Models of a run: which encoder, how a budget becomes ranks, how a method is attached.

1. Encoder: ``run.model.pretrained_id`` (RoBERTa-base as specified), float32, under a new classification head.
2. Ranks: LoRA's adapters of every targeted matrix may have ``parameter_budget_percent`` per cent of the encoder's
   parameters together; :func:`fwlora.plan_ranks` solves for the largest ranks within it, as equal as possible.
3. Method: adapters on these matrices, the same for LoRA and FW-LoRA; AdaLoRA has triplets of the same budget.

For equal seeds every method starts from the same head, and LoRA and FW-LoRA from the same adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fwlora.adalora import AdaLora, attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs
from fwlora.architectures import TargetModuleError, encoder_parameter_count, find_target_matrices
from fwlora.budget import BudgetError, adapter_cost
from fwlora.config import RankPlan, attach_lora, plan_ranks
from fwlora.experiment.errors import UserError
from fwlora.experiment.methods import Method
from fwlora.experiment.methods.adalora import AdaLoraMethod
from fwlora.experiment.methods.fw_lora import FwLoraMethod
from fwlora.experiment.methods.lora import LoraMethod
from fwlora.experiment.modeling.build import (
    AdaptedModel,
    count_parameters,
    load_classifier,
    make_weightless_model,
    train_head_only,
)
from fwlora.experiment.modeling.pretrained import fingerprint_weights
from fwlora.experiment.settings.schema import ModelSettings, RunSettings
from fwlora.options import FisherWeighting
from fwlora.regularizer import FisherWeightedLora

# A separate seed for adapter initialisation, so that the head is the same for every method.
ADAPTER_SEED_OFFSET = 1_000_003


def plan_adapters(settings: ModelSettings) -> RankPlan:
    """Turn the budget into a rank for every targeted matrix, on a weightless copy of the model.

    Args:
        settings: the node ``run.model``. Where ``budget_mode`` is ``rank``, every matrix gets ``lora.rank`` and the
            budget is what that costs.

    Raises:
        UserError: a model that cannot be fetched, targets that match nothing, a budget too small for any rank.
    """
    model = make_weightless_model(settings)
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


def build_model(
    run: RunSettings, plan: RankPlan, num_classes: int, pad_token_id: int, total_steps: int, device: torch.device
) -> AdaptedModel:
    """Load the encoder and attach the run's method.

    Args:
        run: the node ``run``.
        plan: a rank for every targeted matrix.
        num_classes: outputs of the head.
        pad_token_id: token that batches are padded with; models that classify by the last token search for it.
        total_steps: optimizer steps of the training to come; AdaLoRA's schedule needs them.
        device: where the model is trained.

    Raises:
        UserError: weights that cannot be fetched, or a schedule that does not fit ``total_steps``.
    """
    torch.manual_seed(run.training.seed)
    model, heads = load_classifier(run.model, num_classes, pad_token_id)
    unadapted_parameters = sum(parameter.numel() for parameter in model.parameters())
    fingerprint = fingerprint_weights(model, heads)
    torch.manual_seed(run.training.seed + ADAPTER_SEED_OFFSET)
    adapted, method = _attach(model, run, plan, heads, total_steps, device)
    return AdaptedModel(adapted, method, count_parameters(adapted, method, plan, unadapted_parameters), fingerprint)


def _attach(
    model: nn.Module, run: RunSettings, plan: RankPlan, heads: list[str], total_steps: int, device: torch.device
) -> tuple[nn.Module, Method]:
    lora = run.model.lora
    if not lora.enabled:
        train_head_only(model, heads)
        return model.to(device), LoraMethod([])
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
            return adapted, AdaLoraMethod(AdaLora(adapted, adalora_plan))
        except ValueError as error:
            raise UserError(f"run.adalora with {total_steps} optimiser steps: {error}") from None
    adapted = attach_lora(model, plan.ranks, **options).to(device)
    if run.method == "baseline_lora":
        return adapted, LoraMethod(find_adapter_pairs(adapted))
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
    return adapted, FwLoraMethod(FisherWeightedLora(adapted, options))
