"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) under a parameter budget: plan, attach, drive the allocator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from fwlora.adapters import AdapterPair, check_attached, find_adapter_pairs
from fwlora.architectures import stores_transposed
from fwlora.budget import MatrixShape
from fwlora.config import lora_fields, wrap_with_peft
from fwlora.orthogonality import orthogonality_term
from fwlora.targets import TargetPatterns
from fwlora.triplet_scores import TripletScores


@dataclass(frozen=True)
class AdaLoraPlan:
    """AdaLoRA's initial rank within a parameter budget.

    PEFT budgets triplets (one singular value with its two vectors), not parameters. Where triplets cost unlike numbers
    of parameters, as many as the budget pays for on average use more or less of it than there is. Here the schedule
    falls from the initial cost in parameters to the budget, and at every allocation the triplets of highest score are
    kept whose parameters fit.

    Attributes:
        init_rank: rank that every matrix starts with: ceil(factor x mean LoRA rank of the same budget), and at least
            enough to start above the budget.
        budget: parameters that the triplets kept at the end may cost, d_in + d_out + 1 each.
    """

    init_rank: int
    budget: int


def plan_adalora(
    matrices: Sequence[MatrixShape], budget: int, mean_rank: float, init_rank_factor: float
) -> AdaLoraPlan:
    """Plan AdaLoRA's initial rank for a parameter budget; see :class:`AdaLoraPlan`.

    Args:
        matrices: that are adapted.
        budget: parameters that the triplets kept at the end may cost.
        mean_rank: LoRA's mean rank for the same budget.
        init_rank_factor: initial rank in multiples of ``mean_rank``.

    Raises:
        ValueError: the budget pays for no triplet.
    """
    costs = [matrix.cost + 1 for matrix in matrices]
    if min(costs) > budget:
        raise ValueError(f"{budget} parameters pay for no AdaLoRA triplet; the cheapest costs {min(costs)}")
    init_rank = math.ceil(init_rank_factor * mean_rank - 1e-9)
    return AdaLoraPlan(max(init_rank, budget // sum(costs) + 1), budget)


def attach_adalora(
    model: nn.Module,
    matrices: Sequence[MatrixShape],
    plan: AdaLoraPlan,
    *,
    scaling: float,
    dropout: float,
    total_steps: int,
    schedule: Mapping[str, Any],
    head_modules: Sequence[str] = (),
    task_type: str | None = None,
) -> PeftModel:
    """Attach AdaLoRA adapters with LoRA's scaling s: PEFT divides alpha by the initial rank, so alpha = s x init_rank.

    Args:
        model: the model to adapt; its modules are changed in place.
        matrices: that get an adapter.
        plan: initial rank and budget.
        scaling: s of every update.
        dropout: probability on the adapters' inputs.
        total_steps: optimizer steps of the training to come.
        head_modules: modules that are trained in full and saved with the adapter.
        task_type: PEFT's name of the task.
        schedule: PEFT's own keys: ``tinit``, ``tfinal``, ``deltaT``, ``beta1``, ``beta2``, ``orth_reg_weight``.

    Returns:
        PEFT's model around ``model``.

    Raises:
        ValueError: PEFT attached other adapters, or trains other modules, than these.
    """
    names = [matrix.name for matrix in matrices]
    patterns = TargetPatterns.make(names, [path for path, _ in model.named_modules()])
    config = AdaLoraConfig(
        init_r=plan.init_rank,
        target_r=max(1, round(plan.budget / sum(matrix.cost + 1 for matrix in matrices))),
        lora_alpha=scaling * plan.init_rank,  # type: ignore[arg-type]
        target_modules=patterns.target_modules,
        fan_in_fan_out=stores_transposed(model, names),
        lora_dropout=dropout,
        total_step=total_steps,
        modules_to_save=list(head_modules) or None,
        task_type=task_type,
        **schedule,
    )
    adapted = wrap_with_peft(model, config)
    check_attached(adapted, dict.fromkeys(names, plan.init_rank), head_modules)
    return adapted


class AdaLora:
    """Drive the schedule of PEFT's AdaLoRA to a parameter budget.

    A loop adds :meth:`loss_term` to the loss of every optimizer step and calls :meth:`after_step` after
    ``optimizer.step()``, before ``zero_grad()``. Scores, masks and averages are PEFT's (Zhang et al., ICLR 2023,
    arXiv 2303.10512).

    Args:
        model: a PEFT model with one AdaLoRA adapter, whose config has ``total_step``, ``tinit`` and ``tfinal``.
        plan: the budget.
        adapter_name: which adapter.

    Attributes:
        pairs: the adapted matrices, in model order.
        plan: the budget.
        last_term: value of the latest :meth:`loss_term`, a scalar tensor.

    Raises:
        ValueError: a schedule without room for allocation.
    """

    def __init__(self, model: PeftModel, plan: AdaLoraPlan, adapter_name: str = "default") -> None:
        self.pairs = find_adapter_pairs(model, adapter_name)
        self.plan = plan
        self._tuner = cast(Any, model.base_model)
        self._config = cast(Any, model.peft_config[adapter_name])
        self._allocator = cast(Any, self._tuner.rankallocator)
        self._costs = [pair.A.shape[1] + pair.B.shape[0] + 1 for pair in self.pairs]
        # PEFT's cubic schedule, in parameters; how much of them each allocation keeps is decided here.
        self._allocator.init_bgt = sum(cost * pair.rank for cost, pair in zip(self._costs, self.pairs, strict=True))
        self._allocator.target_bgt = plan.budget
        self._allocator.mask_to_budget = self._mask_to_budget
        self._scores = TripletScores(self.pairs, self._allocator)
        self._allocator.update_ipt = self._scores.update
        self._last_allocation_step = int(self._config.total_step or 0) - self._config.tfinal
        self.last_term = torch.zeros(())
        if self._last_allocation_step < 2:
            raise ValueError(
                f"AdaLoRA's schedule ends at step {self._last_allocation_step}; it needs at least 2 steps of allocation"
            )

    @property
    def term_weight(self) -> float:
        """Weight of :meth:`loss_term`."""
        return float(self._config.orth_reg_weight)

    def loss_term(self) -> Tensor | None:
        r"""Return orth_reg_weight / (2 M) sum_m (||A A^T - I||_F + ||B^T B - I||_F), a scalar: R(P, Q) as PEFT has it.

        M is the number of matrices, A has shape (r, d_in) and B (d_out, r). None where the weight is 0.
        """
        if self.term_weight == 0:
            return None
        term = orthogonality_term([(pair.A, pair.B) for pair in self.pairs], self.term_weight)
        self.last_term = term.detach()
        return term

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update scores and masks after optimizer step number ``step``, counted from 1; gradients must still be there.

        After the schedule's last step the kept triplets stay the same.
        """
        self._tuner.update_and_allocate(step)

    def active_ranks(self) -> list[int]:
        """Count the triplets that are not masked, one number per matrix, as of the latest allocation."""
        pattern = self._config.rank_pattern or {}
        ranks = []
        for name, pair in zip(self._scores.keys, self.pairs, strict=True):
            mask = pattern.get(name, pattern.get(name.removesuffix(f".{self._allocator.adapter_name}")))
            ranks.append(pair.A.shape[0] if mask is None else sum(mask))
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside the weights: PEFT's averages of sensitivity, and the current masks."""
        return {
            "averages": self._scores.state(),
            "rank_pattern": dict(self._config.rank_pattern or {}),
            "last_term": self.last_term,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model's weights beside it.

        Raises:
            ValueError: a state of other matrices.
        """
        if not {name for name in state["rank_pattern"] if ".lora_E." in name} <= set(self._scores.keys):
            raise ValueError("`state` belongs to another model: its masks are those of other matrices")
        self._scores.load(state["averages"])
        self._config.rank_pattern = dict(state["rank_pattern"])
        self.last_term = state["last_term"]

    @torch.no_grad()
    def _mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set the singular values of all but the chosen triplets to 0, in place of PEFT's allocator.

        Args:
            model: whose triplets are masked.
            budget: parameters that the triplets may cost now.

        Returns:
            Which triplets of each matrix are kept, by PEFT's keys.
        """
        pattern = {}
        for key, pair, kept in zip(self._scores.keys, self.pairs, self._choose_triplets(budget), strict=True):
            assert pair.E is not None
            if not all(kept):
                pair.E.masked_fill_(~torch.tensor(kept, device=pair.E.device)[:, None], 0.0)
            pattern[key] = kept
        return pattern

    def _choose_triplets(self, budget: int) -> list[list[bool]]:
        """Choose the triplets of highest score (PEFT's) while their parameters fit, ties in the order of their rows.

        A triplet that does not fit any more is passed over, so that a cheaper one of lower score can use the rest.
        PEFT's own threshold would drop every triplet that ties with it.

        Returns:
            For every matrix, which of its triplets are kept.
        """
        scores = self._scores.compute().tolist()
        places = [(place, index) for index, pair in enumerate(self.pairs) for place in range(pair.rank)]
        kept = [[False] * pair.rank for pair in self.pairs]
        for _, place, index in sorted((-score, *where) for score, where in zip(scores, places, strict=True)):
            if self._costs[index] <= budget:
                budget -= self._costs[index]
                kept[index][place] = True
        return kept


@torch.no_grad()
def save_as_lora(model: PeftModel, pairs: Sequence[AdapterPair], folder: str | Path) -> None:
    """Save a trained AdaLoRA adapter as LoRA, B diag(E) A as B (E A), with the triplets that are in use.

    transformers cannot load a pruned AdaLoRA adapter, since its shapes are not those of its configuration; every loader
    of LoRA adapters loads this one, with the same outputs.

    Args:
        model: with the adapter.
        pairs: the matrices that carry it.
        folder: that is written to.
    """
    stored: Any = model.peft_config[pairs[0].adapter_name]
    kept = [pair.E[:, 0] != 0 for pair in pairs if pair.E is not None]
    if not any(mask.any() for mask in kept):
        kept[0][0] = True  # an untrained adapter: LoRA needs a matrix
    ranks = {pair.name: int(mask.sum()) for pair, mask in zip(pairs, kept, strict=True)}
    config = LoraConfig(
        **lora_fields(model.get_base_model(), ranks, pairs[0].scaling),
        fan_in_fan_out=stored.fan_in_fan_out,
        lora_dropout=stored.lora_dropout,
        modules_to_save=stored.modules_to_save,
        task_type=stored.task_type,
        base_model_name_or_path=stored.base_model_name_or_path,
        revision=stored.revision,
        inference_mode=True,
    )
    weights = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for name, value in module.modules_to_save[pairs[0].adapter_name].state_dict().items()
    }
    for pair, mask in zip(pairs, kept, strict=True):
        if ranks[pair.name]:
            A, B = pair.factors()
            weights[f"base_model.model.{pair.name}.lora_A.weight"] = A[mask]
            weights[f"base_model.model.{pair.name}.lora_B.weight"] = B[:, mask]
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    contiguous = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(contiguous, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def keep_orthogonal_term_out_of_evaluation(tuner: AdaLoraModel) -> None:
    """Make a model in eval mode return the task's loss alone; PEFT adds its orthogonality term there too."""
    # Bound to the object, so that a deep copy of the model computes with its own weights.
    tuner.forward = MethodType(_forward_of_mode, tuner)  # type: ignore[method-assign]


def _forward_of_mode(tuner: AdaLoraModel, *args: Any, **kwargs: Any) -> Any:
    return type(tuner).forward(tuner, *args, **kwargs) if tuner.training else tuner.model.forward(*args, **kwargs)
