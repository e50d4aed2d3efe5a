"""Models of a run: which encoder, how a budget becomes ranks, how a method is attached.

1. Encoder: ``run.model.pretrained_id`` (RoBERTa-base as specified), float32, under a new classification head.
2. Ranks: LoRA's adapters of every targeted matrix may have ``parameter_budget_percent`` per cent of the encoder's
   parameters together; :func:`fwlora.plan_ranks` solves for the largest ranks within it, as equal as possible.
3. Method: :mod:`fwlora.experiment.methods` has a file for each. LoRA trains adapters s B A of these ranks. FW-LoRA
   trains the same adapters; after its Fisher warm-up a term shrinks the updates of unimportant matrices. AdaLoRA starts
   with more triplets and prunes them down to the budget.

For equal seeds every method starts from the same head, and LoRA and FW-LoRA from the same adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fwlora.architectures import TargetModuleError, encoder_parameter_count, find_target_matrices
from fwlora.budget import BudgetError, adapter_cost
from fwlora.config import RankPlan, plan_ranks
from fwlora.experiment.errors import UserError
from fwlora.experiment.methods import Method, get_method
from fwlora.experiment.modeling.build import (
    AdaptedModel,
    count_parameters,
    load_classifier,
    make_weightless_model,
    train_head_only,
)
from fwlora.experiment.modeling.pretrained import fingerprint_weights
from fwlora.experiment.settings.schema import ModelSettings, RunSettings

# A separate seed for adapter initialization, so that the head is the same for every method.
ADAPTER_SEED_OFFSET = 1_000_003


def plan_adapters(settings: ModelSettings) -> RankPlan:
    """Turn the budget into a rank for every targeted matrix, on a weightless copy of the model.

    Args:
        settings: the node ``run.model``. Where ranks are fixed, every matrix gets ``lora.rank`` and the
            budget is what that costs.

    Raises:
        UserError: a model that cannot be fetched, targets that match nothing, a budget too small for any rank.
    """
    model = make_weightless_model(settings)
    try:
        if settings.ranks_are_fixed:
            matrices = find_target_matrices(model, settings.lora.target_modules)
            ranks = {matrix.name: settings.lora.rank for matrix in matrices}
            return RankPlan(matrices, ranks, encoder_parameter_count(model), adapter_cost(matrices, ranks))
        return plan_ranks(model, settings.parameter_budget_percent, settings.lora.target_modules)
    except TargetModuleError as error:
        raise UserError(f"run.model.lora.target_modules: {error}") from None
    except BudgetError as error:
        raise UserError(f"run.model.parameter_budget_percent: {error}") from None


def attach_method(
    model: nn.Module, run: RunSettings, plan: RankPlan, heads: Sequence[str], total_steps: int, device: torch.device
) -> tuple[nn.Module, Method]:
    """Attach the method that ``run.method`` names; with ``model.lora.enabled`` false train the head alone.

    Args:
        model: encoder and head, on the CPU.
        run: the node ``run``.
        plan: a rank for every targeted matrix.
        heads: names of the modules that make up the head, trained in full by every method.
        total_steps: optimizer steps of the training to come.
        device: where the model is trained.

    Returns:
        The adapted model on the device, and what the training loop calls.
    """
    if not run.model.lora.enabled:
        train_head_only(model, heads)
        return model.to(device), Method([])
    spec = get_method(run.method)
    return spec.attach(model, plan, run, head_modules=heads, total_steps=total_steps, device=device)


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
    adapted, method = attach_method(model, run, plan, heads, total_steps, device)
    return AdaptedModel(adapted, method, count_parameters(adapted, method, plan, unadapted_parameters), fingerprint)
