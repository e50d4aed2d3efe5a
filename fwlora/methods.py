"""LoRA, AdaLoRA and FW-LoRA behind one protocol, so that one training loop serves them all.

Per optimiser step a loop calls, in this order: ``regularisation()`` (a term for the loss), ``backward()``,
``after_backward()``, clipping and ``optimizer.step()``, ``after_step(step)`` with steps counted from 1,
``zero_grad()``.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from fwlora.adapters import AdapterPair, delta_norms, find_adapter_pairs, stores_transposed
from fwlora.budget import MatrixShape
from fwlora.config import lora_fields
from fwlora.estimators import PassRecorder
from fwlora.regularizer import FisherWeightedLora


class Method(Protocol):
    """What a training loop needs to know of a method.

    Attributes:
        pairs: the adapted matrices, in model order.
    """

    pairs: list[AdapterPair]

    @property
    def in_warmup(self) -> bool:
        """Whether importances are being measured."""

    @property
    def has_term(self) -> bool:
        """Whether :meth:`regularisation` adds anything to the loss."""

    @property
    def observer(self) -> PassRecorder | None:
        """What paths that bypass module hooks give X and G of this step's passes to, matrices by their place in
        ``pairs``; None where nothing is measured, or not from these.
        """

    def regularisation(self) -> Tensor | None:
        """A differentiable term to add to this step's loss, once per optimiser step; None where there is none."""

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Between ``backward()`` and clipping."""

    def after_step(self, step: int) -> None:
        """After ``optimizer.step()`` number ``step``, before ``zero_grad()``."""

    def step_values(self) -> Mapping[str, Tensor | float]:
        """What to log of this step: ``penalty``, and what else the method has."""

    def module_table(self) -> Mapping[str, list[Any]]:
        """Parallel lists over adapted matrices: ``names``, ``ranks``, ``importances`` (or None), ``delta_norms``."""


class PlainLora:
    """LoRA (Hu et al., 2021, arXiv 2106.09685), or a head alone when there is no adapter."""

    in_warmup = False
    has_term = False
    observer: PassRecorder | None = None

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        self.pairs = list(pairs)

    def regularisation(self) -> Tensor | None:
        return None

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        return

    def after_step(self, step: int) -> None:
        return

    def step_values(self) -> Mapping[str, Tensor | float]:
        return {"penalty": 0.0}

    def module_table(self) -> Mapping[str, list[Any]]:
        return {
            "names": [pair.name for pair in self.pairs],
            "ranks": [pair.rank for pair in self.pairs],
            "importances": [None] * len(self.pairs),
            "delta_norms": delta_norms(self.pairs).tolist() if self.pairs else [],
        }


class FwLora(PlainLora):
    """Fisher-weighted LoRA: :class:`fwlora.regularizer.FisherWeightedLora` as a method."""

    def __init__(self, fisher_weighted: FisherWeightedLora) -> None:
        super().__init__(fisher_weighted.pairs)
        self.fisher_weighted = fisher_weighted

    @property
    def in_warmup(self) -> bool:  # type: ignore[override]
        return self.fisher_weighted.in_warmup

    @property
    def observer(self) -> PassRecorder | None:  # type: ignore[override]
        return self.fisher_weighted.observer

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        self.fisher_weighted.step(optimizer)

    def step_values(self) -> Mapping[str, Tensor | float]:
        return {"penalty": self.fisher_weighted.last_penalty}

    def module_table(self) -> Mapping[str, list[Any]]:
        table = dict(super().module_table())
        if not self.in_warmup:
            table["importances"] = list(self.fisher_weighted.importance().values())
        return table


@dataclass(frozen=True)
class AdaLoraPlan:
    """How AdaLoRA meets a parameter budget.

    PEFT budgets triplets (one singular value with its two vectors), not parameters, and its ``target_r`` is an average,
    so it cannot hold a parameter budget by itself. Here the target is the number of triplets that the budget affords on
    average; when the schedule ends, the least important kept triplets are dropped until the real cost fits.

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
    """Initial rank and target of AdaLoRA for a parameter budget; see :class:`AdaLoraPlan`.

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


class AdaLora:
    """AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512), PEFT's implementation with its schedule driven.

    Args:
        model: a PEFT model with one AdaLoRA adapter, whose config says ``total_step``, ``tinit`` and ``tfinal``.
        plan: target and budget.
        adapter_name: which adapter.

    Raises:
        ValueError: a schedule without room for allocation.
    """

    in_warmup = False
    has_term = True
    observer: PassRecorder | None = None

    def __init__(self, model: PeftModel, plan: AdaLoraPlan, adapter_name: str = "default") -> None:
        self.pairs = find_adapter_pairs(model, adapter_name)
        self.plan = plan
        self._tuner = cast(Any, model.base_model)
        self._config = cast(Any, model.peft_config[adapter_name])
        self._allocator = cast(Any, self._tuner.rankallocator)
        self._allocator.target_bgt = plan.target_triplets
        self._last_allocation_step = int(self._config.total_step or 0) - self._config.tfinal
        self._orthogonal = torch.zeros(())
        if self._last_allocation_step < 2:
            raise ValueError(
                f"AdaLoRA's schedule ends at step {self._last_allocation_step}; it needs at least 2 steps of allocation"
            )

    def regularisation(self) -> Tensor | None:
        r"""orth_reg_weight / (2 M) sum_m (||A A^T - I||_F + ||B^T B - I||_F): R(P, Q) as PEFT computes it."""
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
        term = self._config.orth_reg_weight * torch.cat(norms).mean()
        self._orthogonal = term.detach()
        return term

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        return

    @torch.no_grad()
    def after_step(self, step: int) -> None:
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

    def step_values(self) -> Mapping[str, Tensor | float]:
        return {"penalty": self._orthogonal, "active_rank": float(sum(self.active_ranks()))}

    def active_ranks(self) -> list[int]:
        """Triplets not masked, per matrix, as of the latest allocation."""
        pattern = self._config.rank_pattern or {}
        ranks = []
        for name, pair in zip(self._pattern_keys(), self.pairs, strict=True):
            mask = pattern.get(name, pattern.get(name.removesuffix(f".{self._allocator.adapter_name}")))
            ranks.append(pair.A.shape[0] if mask is None else sum(mask))
        return ranks

    def module_table(self) -> Mapping[str, list[Any]]:
        return {
            "names": [pair.name for pair in self.pairs],
            "ranks": self.active_ranks(),
            "importances": [None] * len(self.pairs),
            "delta_norms": delta_norms(self.pairs).tolist(),
        }

    def _pattern_keys(self) -> list[str]:
        return [f"{pair.name}.lora_E.{self._allocator.adapter_name}" for pair in self.pairs]

    def _choose_triplets(self) -> list[Tensor]:
        """Masks of the triplets kept for good, by PEFT's scores: the target's number, less what the budget refuses.

        Chosen here and not by PEFT's threshold because that one drops every triplet that ties with it.
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
        """PEFT's importance of each triplet of one matrix, s(E) + mean s(A) + mean s(B), shape (r,)."""
        score = self._allocator._element_score
        of_A = score(key_E.replace(".lora_E.", ".lora_A.")).mean(dim=1)
        of_B = score(key_E.replace(".lora_E.", ".lora_B.")).mean(dim=0)
        return score(key_E).view(-1) + of_A + of_B


def keep_orthogonal_term_out_of_evaluation(tuner: AdaLoraModel) -> None:
    """From now on a model in eval mode returns the task's loss alone; PEFT adds its orthogonality term there too."""
    # Bound to the object, so that a deep copy of the model computes with its own weights.
    tuner.forward = MethodType(_forward_of_mode, tuner)  # type: ignore[method-assign]


def _forward_of_mode(tuner: AdaLoraModel, *args: Any, **kwargs: Any) -> Any:
    return type(tuner).forward(tuner, *args, **kwargs) if tuner.training else tuner.model.forward(*args, **kwargs)


def attach_lora(
    model: nn.Module,
    ranks: dict[str, int],
    *,
    scaling: float,
    dropout: float,
    head_modules: Sequence[str] = (),
    task_type: str | None = None,
) -> PeftModel:
    """LoRA adapters of the given rank per matrix, all with the same scaling s = alpha_m / r_m.

    Args:
        ranks: matrix name -> rank; rank 0 is left out.
        head_modules: trained in full and saved with the adapter.
    """
    config = LoraConfig(
        **lora_fields(ranks, scaling),
        fan_in_fan_out=stores_transposed(model, [name for name, rank in ranks.items() if rank > 0]),
        lora_dropout=dropout,
        modules_to_save=list(head_modules) or None,
        task_type=task_type,
    )
    return _get_peft_model(model, config)


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
    """AdaLoRA adapters. PEFT divides alpha by the initial rank, so alpha = s x init_rank keeps LoRA's scaling s.

    Args:
        schedule: PEFT's own keys: ``tinit``, ``tfinal``, ``deltaT``, ``beta1``, ``beta2``, ``orth_reg_weight``.
    """
    names = [matrix.name for matrix in matrices]
    config = AdaLoraConfig(
        init_r=plan.init_rank,
        target_r=max(1, round(plan.target_triplets / len(matrices))),
        lora_alpha=scaling * plan.init_rank,  # type: ignore[arg-type]
        target_modules=names,
        fan_in_fan_out=stores_transposed(model, names),
        lora_dropout=dropout,
        total_step=total_steps,
        modules_to_save=list(head_modules) or None,
        task_type=task_type,
        **schedule,
    )
    return _get_peft_model(model, config)


def _get_peft_model(model: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT 0.21 still asks transformers 5 under the old name; the answer is right.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)
