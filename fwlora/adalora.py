"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) under a parameter budget: plan, attach, drive the allocator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from fwlora.adapters import check_attached, find_adapter_pairs
from fwlora.architectures import stores_transposed
from fwlora.budget import MatrixShape
from fwlora.config import wrap_with_peft
from fwlora.targets import TargetPatterns

# Attributes of PEFT's allocator: sensitivity and its two moving averages, by parameter name.
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class AdaLoraPlan:
    """AdaLoRA's initial rank and target within a parameter budget.

    PEFT budgets triplets (one singular value with its two vectors), not parameters, and its ``target_r`` is an average,
    which does not bound the parameters. Here the target is the number of triplets that the budget pays for on average;
    when the schedule ends, the least important kept triplets are dropped until the real cost fits.

    Attributes:
        init_rank: rank that every matrix starts with: ceil(factor x mean LoRA rank of the same budget), and at least
            enough to start above the target.
        target_triplets: triplets kept at the end of PEFT's schedule.
        budget: parameters that the kept triplets may cost, d_in + d_out + 1 each.
    """

    init_rank: int
    target_triplets: int
    budget: int


def plan_adalora(
    matrices: Sequence[MatrixShape], budget: int, mean_rank: float, init_rank_factor: float
) -> AdaLoraPlan:
    """Plan AdaLoRA's initial rank and target for a parameter budget; see :class:`AdaLoraPlan`.

    Args:
        matrices: that are adapted.
        budget: parameters that the triplets kept at the end may cost.
        mean_rank: LoRA's mean rank for the same budget.
        init_rank_factor: initial rank in multiples of ``mean_rank``.

    Raises:
        ValueError: the budget pays for no triplet.
    """
    costs = [matrix.cost + 1 for matrix in matrices]
    target = int(budget * len(costs) / sum(costs))
    if target < 1 or min(costs) > budget:
        raise ValueError(f"{budget} parameters pay for no AdaLoRA triplet; the cheapest costs {min(costs)}")
    init_rank = math.ceil(init_rank_factor * mean_rank - 1e-9)
    # PEFT's threshold is the k-th smallest score with k = initial - target, which must not be 0.
    init_rank = max(init_rank, target // len(costs) + 1)
    return AdaLoraPlan(init_rank, target, budget)


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
        plan: initial rank and target.
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
        target_r=max(1, round(plan.target_triplets / len(matrices))),
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
        plan: target and budget.
        adapter_name: which adapter.

    Attributes:
        pairs: the adapted matrices, in model order.
        plan: target and budget.
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
        self._allocator.target_bgt = plan.target_triplets
        self._last_allocation_step = int(self._config.total_step or 0) - self._config.tfinal
        self.last_term = torch.zeros(())
        if self._last_allocation_step < 2:
            raise ValueError(
                f"AdaLoRA's schedule ends at step {self._last_allocation_step}; it needs at least 2 steps of allocation"
            )

    def loss_term(self) -> Tensor | None:
        r"""Return orth_reg_weight / (2 M) sum_m (||A A^T - I||_F + ||B^T B - I||_F), a scalar: R(P, Q) as PEFT has it.

        M is the number of matrices, A has shape (r, d_in) and B (d_out, r). None where the weight is 0.
        """
        if self._config.orth_reg_weight == 0:
            return None
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for pair in self.pairs:
            groups[pair.A.shape].append(pair.A)
            groups[pair.B.mT.shape].append(pair.B.mT)
        norms = []
        for factors in groups.values():
            P = torch.stack(factors)
            identity = torch.eye(P.shape[1], device=P.device, dtype=P.dtype)
            norms.append(torch.linalg.matrix_norm(P @ P.mT - identity))
        term: Tensor = self._config.orth_reg_weight * torch.cat(norms).mean()
        self.last_term = term.detach()
        return term

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update scores and masks after optimizer step number ``step``, counted from 1; gradients must still be there.

        At the schedule's last step the triplets that are kept for good are chosen, within the budget.
        """
        if step != self._last_allocation_step:
            self._tuner.update_and_allocate(step)
            return
        kept = self._choose_triplets()
        values = [pair.E.clone() for pair in self.pairs if pair.E is not None]
        self._tuner.update_and_allocate(step)
        pattern = self._config.rank_pattern or {}
        for name, pair, value, mask in zip(self._pattern_keys(), self.pairs, values, kept, strict=True):
            assert pair.E is not None
            pair.E.copy_(value * mask[:, None])
            pattern[name] = mask.tolist()
        self._config.rank_pattern = pattern

    def active_ranks(self) -> list[int]:
        """Count the triplets that are not masked, one number per matrix, as of the latest allocation."""
        pattern = self._config.rank_pattern or {}
        ranks = []
        for name, pair in zip(self._pattern_keys(), self.pairs, strict=True):
            mask = pattern.get(name, pattern.get(name.removesuffix(f".{self._allocator.adapter_name}")))
            ranks.append(pair.A.shape[0] if mask is None else sum(mask))
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside the weights: PEFT's averages of sensitivity, and the current masks."""
        return {
            "averages": {name: dict(getattr(self._allocator, name)) for name in _AVERAGES},
            "rank_pattern": dict(self._config.rank_pattern or {}),
            "last_term": self.last_term,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; load the model's weights beside it.

        Raises:
            ValueError: a state of other matrices.
        """
        keys = set(self._pattern_keys())
        if not {name for name in state["rank_pattern"] if ".lora_E." in name} <= keys:
            raise ValueError("`state` belongs to another model: its masks are those of other matrices")
        for name in _AVERAGES:
            setattr(self._allocator, name, dict(state["averages"][name]))
        self._config.rank_pattern = dict(state["rank_pattern"])
        self.last_term = state["last_term"]

    def _pattern_keys(self) -> list[str]:
        return [f"{pair.name}.lora_E.{self._allocator.adapter_name}" for pair in self.pairs]

    def _choose_triplets(self) -> list[Tensor]:
        """Choose the triplets kept for good by PEFT's scores: the target's number, less what exceeds the budget.

        PEFT's own threshold would drop every triplet that ties with it.

        Returns:
            One mask of shape (r,) per matrix.
        """
        scored = []
        for index, (key, pair) in enumerate(zip(self._pattern_keys(), self.pairs, strict=True)):
            scores = self._triplet_scores(key).tolist()
            scored += [
                (-score, place, index, pair.A.shape[1] + pair.B.shape[0] + 1) for place, score in enumerate(scores)
            ]
        kept = sorted(scored)[: self.plan.target_triplets]
        cost = sum(item[3] for item in kept)
        while cost > self.plan.budget:
            cost -= kept.pop()[3]
        masks = [torch.zeros(pair.A.shape[0], dtype=torch.bool, device=pair.A.device) for pair in self.pairs]
        for _, place, index, _ in kept:
            masks[index][place] = True
        return masks

    def _triplet_scores(self, key_E: str) -> Tensor:
        """Return PEFT's score of each triplet of one matrix, s(E) + mean s(A) + mean s(B), shape (r,)."""
        score = self._allocator._element_score
        of_A = score(key_E.replace(".lora_E.", ".lora_A.")).mean(dim=1)
        of_B = score(key_E.replace(".lora_E.", ".lora_B.")).mean(dim=0)
        scores: Tensor = score(key_E).view(-1) + of_A + of_B
        return scores


def keep_orthogonal_term_out_of_evaluation(tuner: AdaLoraModel) -> None:
    """Make a model in eval mode return the task's loss alone; PEFT adds its orthogonality term there too."""
    # Bound to the object, so that a deep copy of the model computes with its own weights.
    tuner.forward = MethodType(_forward_of_mode, tuner)  # type: ignore[method-assign]


def _forward_of_mode(tuner: AdaLoraModel, *args: Any, **kwargs: Any) -> Any:
    return type(tuner).forward(tuner, *args, **kwargs) if tuner.training else tuner.model.forward(*args, **kwargs)
