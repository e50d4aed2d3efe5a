"""``fwlora plan``: which matrix gets which rank within a budget, before any weight is loaded."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModel

from fwlora.architectures import TargetModuleError
from fwlora.budget import BudgetError
from fwlora.config import RankPlan, plan_ranks
from fwlora.experiment.errors import UserError
from fwlora.experiment.modeling.pretrained import fetching, resolve_pretrained


def plan_pretrained(model_id: str, budget_percent: float, target_modules: Sequence[str] | None) -> RankPlan:
    """Plan the ranks for a pretrained model, from its configuration alone.

    Raises:
        UserError: a model that cannot be fetched, targets that match nothing, a budget that pays for no rank.
    """
    setting = "model"
    with fetching(model_id, setting), torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(resolve_pretrained(model_id, setting)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the plan says what it leaves out
            return plan_ranks(model, budget_percent, target_modules)
    except TargetModuleError as error:
        raise UserError(f"--target-modules: {error}") from None
    except BudgetError as error:
        raise UserError(f"--budget: {error}") from None


def rank_table(plan: RankPlan) -> Table:
    """Make a table with a row per kind of matrix and a column per layer; a rank of 0 is a dot."""
    ranks: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    shapes: dict[str, str] = {}
    for matrix in plan.matrices:
        ranks[matrix.kind][matrix.depth].append(plan.ranks[matrix.name])
        shapes[matrix.kind] = f"{matrix.in_features} -> {matrix.out_features}"
    depths = sorted({matrix.depth for matrix in plan.matrices})
    table = Table(caption="rank per layer (columns); . = no adapter", caption_justify="left")
    table.add_column("matrix", no_wrap=True)
    table.add_column("shape", no_wrap=True, justify="right")
    for depth in depths:
        table.add_column(str(depth), justify="right", no_wrap=True)
    for kind, by_depth in ranks.items():
        cells = [",".join(str(rank) if rank else "." for rank in by_depth[depth]) for depth in depths]
        table.add_row(kind, shapes[kind], *cells)
    return table


def summary_lines(plan: RankPlan, budget_percent: float) -> list[str]:
    """Write the budget, how much of it the ranks use, and what gets no adapter."""
    smallest, largest = min(plan.ranks.values()), max(plan.ranks.values())
    ranks = f"rank {smallest}" if smallest == largest else f"ranks {smallest} and {largest}"
    used = math.floor(1000 * plan.cost / plan.budget) / 10
    lines = [
        f"budget: {budget_percent:g} % of {plan.encoder_parameters:,} encoder parameters = {plan.budget:,}",
        f"used:   {plan.cost:,} ({used} %) on {sum(rank > 0 for rank in plan.ranks.values())} of "
        f"{len(plan.ranks)} matrices, {ranks}",
    ]
    if plan.left_out:
        lines.append(f"left out: {'; '.join(plan.left_out)}; name them with --target-modules where they are linear")
    return lines


def as_json(plan: RankPlan, model_id: str, budget_percent: float) -> str:
    """Write the plan for other programs; ``ranks`` fits a LoraConfig's ``rank_pattern`` once its zeros are left out."""
    return json.dumps(
        {
            "model": model_id,
            "budget_percent": budget_percent,
            "encoder_parameters": plan.encoder_parameters,
            "budget": plan.budget,
            "cost": plan.cost,
            "ranks": plan.ranks,
            "left_out": plan.left_out,
        },
        indent=2,
    )
