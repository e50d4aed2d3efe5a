"""A LoRA configuration that carries the options of the method, and the ranks of a parameter budget.

A saved adapter is a plain LoRA adapter: ``adapter_config.json`` holds PEFT's keys alone, so that PEFT loads it without
fwlora and without a warning. What fwlora adds lies in a file beside it.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fwlora.adapters import check_attached
from fwlora.architectures import (
    encoder_parameter_count,
    find_target_matrices,
    list_left_out,
    present_roles,
    stores_transposed,
)
from fwlora.budget import BudgetError, MatrixShape, adapter_cost, budget_parameters, solve_ranks
from fwlora.options import FisherWeighting, is_number
from fwlora.targets import TargetPatterns

FILE_NAME = "fwlora_config.json"
# The options of LoRA that neither change which matrices are adapted nor add parameters that no budget counts.
BESIDE_BUDGET = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "use_rslora", "modules_to_save", "init_lora_weights", "eva_config", "megatron_core",
    "runtime_config",
)  # fmt: skip


@dataclass(frozen=True)
class RankPlan:
    """A rank for every matrix within a budget.

    Attributes:
        matrices: candidates, in model order.
        ranks: rank by matrix name, 0 for none.
        encoder_parameters: of which a budget is a percentage.
        budget: parameters that the adapters may have.
        left_out: what targets that the library chose leave out of attention and feed-forward layers; see
            :func:`fwlora.architectures.list_left_out`.
    """

    matrices: list[MatrixShape]
    ranks: dict[str, int]
    encoder_parameters: int
    budget: int
    left_out: tuple[str, ...] = ()

    @property
    def mean_rank(self) -> float:
        """Mean over all candidates."""
        return sum(self.ranks.values()) / len(self.ranks)

    @property
    def cost(self) -> int:
        """Parameters of adapters of these ranks."""
        return adapter_cost(self.matrices, self.ranks)


def plan_ranks(model: nn.Module, budget_percent: float, target_modules: Sequence[str] | None = None) -> RankPlan:
    """Plan ranks for ``budget_percent`` per cent of the encoder's parameters: of embeddings and layers.

    Args:
        model: the model to be adapted; one without weights, on the meta device, is enough.
        budget_percent: in (0, 100].
        target_modules: as :func:`fwlora.architectures.find_target_matrices` takes them; None for all projections of
            attention inputs and feed-forward layers that the model has.

    Raises:
        ValueError: an adapted model, targets that match nothing, or a budget that pays for no rank.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(f"`model` ({type(model).__name__}) is adapted already; plan ranks for the model before PEFT")
    if isinstance(target_modules, str):
        target_modules = [target_modules]
    targets = present_roles(model) if target_modules is None else list(target_modules)
    if not targets:
        raise ValueError("`target_modules` is empty; name modules or roles, or give None for all projections")
    left_out = list_left_out(model, targets) if target_modules is None else []
    if left_out:
        warnings.warn(
            f"`target_modules` is None, and these of {type(model).__name__} get no adapter: {'; '.join(left_out)}",
            stacklevel=2,
        )
    matrices = find_target_matrices(model, targets)
    encoder_parameters = encoder_parameter_count(model)
    budget = budget_parameters(budget_percent, encoder_parameters)
    # + 1: an AdaLoRA triplet costs d_in + d_out + 1 parameters.
    needed = math.ceil(1e6 * (min(matrix.cost for matrix in matrices) + 1) / encoder_parameters) / 1e4
    try:
        return RankPlan(matrices, solve_ranks(matrices, budget), encoder_parameters, budget, tuple(left_out))
    except BudgetError as error:
        raise BudgetError(
            f"{budget_percent:g} % of {encoder_parameters:,} encoder parameters: {error}; use at least {needed:.4f} %"
        ) from None


@dataclass
class FwLoraConfig(FisherWeighting, LoraConfig):
    """A :class:`peft.LoraConfig` (``peft_type`` stays LORA) with the options of :class:`fwlora.FisherWeighting`.

    ``get_peft_model(base, config)`` builds an ordinary LoRA model; :class:`fwlora.FisherWeightedLora` and
    :class:`fwlora.trainer.FwLoraCallback` read their settings from it.

    Attributes:
        budget_percent: adapter parameters in per cent of the encoder's. Only :meth:`for_model` solves it:
            :class:`fwlora.FisherWeightedLora` refuses a config with a budget and without ranks.

    Raises:
        ValueError: options outside their range, or a variant of LoRA whose update is not s B A.
    """

    budget_percent: float | None = field(
        default=None, metadata={"help": "adapter parameters in per cent of the encoder; solved by for_model"}
    )

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        self.check()
        percent = self.budget_percent
        if percent is not None and not (is_number(percent) and 0 < percent <= 100):
            raise ValueError(f"`budget_percent` is {percent!r}; a budget is above 0 and at most 100 per cent")

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        budget_percent: float,
        target_modules: Sequence[str] | None = None,
        scaling: float = 2.0,
        **options: Any,
    ) -> FwLoraConfig:
        """Make the config whose ranks use most of a budget on ``model`` without exceeding it; see :func:`plan_ranks`.

        Args:
            model: the model to be adapted.
            budget_percent: of the encoder's parameters.
            target_modules: names or roles; None for all projections.
            scaling: s of every update s B A, whatever its rank.
            options: further fields of this class, e.g. ``lora_dropout``, ``task_type``, ``strength``.

        Raises:
            ValueError: see :func:`plan_ranks`; or ``options`` holds what the budget decides or does not count, or a
                start that needs even ranks.
        """
        _check_options_beside_budget(options)
        if not (is_number(scaling) and 0 < scaling < math.inf):
            raise ValueError(f"`scaling` is {scaling!r}; the factor s of an update s B A is above 0")
        plan = plan_ranks(model, budget_percent, target_modules)
        used = [name for name, rank in plan.ranks.items() if rank > 0]
        odd = [name for name in used if plan.ranks[name] % 2]
        if odd and str(options.get("init_lora_weights")).lower() == "orthogonal":
            raise ValueError(
                f"`init_lora_weights` is 'orthogonal', which needs even ranks, but the budget gives {odd[0]!r} rank "
                f"{plan.ranks[odd[0]]}; use another start"
            )
        return cls(
            **lora_fields(model, plan.ranks, scaling, use_rslora=bool(options.get("use_rslora"))),
            fan_in_fan_out=stores_transposed(model, used),
            budget_percent=budget_percent,
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return PEFT's own keys, the only ones that PEFT accepts in ``adapter_config.json``."""
        own = {f.name for f in fields(FwLoraConfig)} - {f.name for f in fields(LoraConfig)}
        return {key: value for key, value in super().to_dict().items() if key not in own}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write PEFT's ``adapter_config.json``, and fwlora's options to a file beside it."""
        super().save_pretrained(str(save_directory), **kwargs)
        content = {**asdict(self.fisher_weighting()), "budget_percent": self.budget_percent}
        path = Path(save_directory) / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FwLoraConfig:  # type: ignore[override]
        """Read both files of a folder, to train on; an adapter without fwlora's file gets the default options.

        Raises:
            ValueError: no adapter there, one of another kind, or an unreadable file.
        """
        folder = Path(pretrained_model_name_or_path)
        stock = LoraConfig.from_pretrained(str(folder), **kwargs)
        folder /= kwargs.get("subfolder") or ""
        if not isinstance(stock, LoraConfig):
            raise ValueError(f"{folder} holds an adapter of type {stock.peft_type}; FW-LoRA needs LORA")
        own: dict[str, Any] = {}
        path = folder / FILE_NAME
        if path.is_file():
            try:
                own = json.loads(path.read_text())
                unknown = sorted(own.keys() - {f.name for f in fields(FisherWeighting)} - {"budget_percent"})
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path} is not a JSON object of settings ({error}); delete it or save again"
                ) from None
            if unknown:
                raise ValueError(
                    f"{path} holds unknown settings {', '.join(unknown)}; a newer fwlora may have saved it"
                )
        stock.inference_mode = False
        return cls(**{f.name: getattr(stock, f.name) for f in fields(LoraConfig) if f.init}, **own)


def lora_fields(model: nn.Module, ranks: dict[str, int], scaling: float, *, use_rslora: bool = False) -> dict[str, Any]:
    """Return the fields of a LoraConfig with a rank for every matrix and one scaling; rank 0 is left out."""
    used = {name: rank for name, rank in ranks.items() if rank > 0}
    patterns = TargetPatterns.make(list(used), [path for path, _ in model.named_modules()])
    alpha = {name: scaling * (math.sqrt(rank) if use_rslora else rank) for name, rank in used.items()}
    return {
        "r": max(used.values()),
        "lora_alpha": max(alpha.values()),
        "rank_pattern": {patterns.keys[name]: rank for name, rank in used.items()},
        "alpha_pattern": {patterns.keys[name]: value for name, value in alpha.items()},
        "target_modules": patterns.target_modules,
    }


def attach_lora(
    model: nn.Module,
    ranks: dict[str, int],
    *,
    scaling: float,
    dropout: float,
    head_modules: Sequence[str] = (),
    task_type: str | None = None,
) -> PeftModel:
    """Attach LoRA adapters of the given rank per matrix, all with the same scaling s = alpha_m / r_m.

    Args:
        model: the model to adapt; its modules are changed in place.
        ranks: rank by matrix name; rank 0 is left out.
        scaling: s of every update s B A.
        dropout: probability on the adapters' inputs.
        head_modules: modules that are trained in full and saved with the adapter.
        task_type: PEFT's name of the task.

    Returns:
        PEFT's model around ``model``.

    Raises:
        ValueError: PEFT attached other adapters, or trains other modules, than these.
    """
    config = LoraConfig(
        **lora_fields(model, ranks, scaling),
        fan_in_fan_out=stores_transposed(model, [name for name, rank in ranks.items() if rank > 0]),
        lora_dropout=dropout,
        modules_to_save=list(head_modules) or None,
        task_type=task_type,
    )
    adapted = wrap_with_peft(model, config)
    check_attached(adapted, {name: rank for name, rank in ranks.items() if rank > 0}, head_modules)
    return adapted


def _check_options_beside_budget(options: dict[str, Any]) -> None:
    """Refuse what a budget decides, and what adds parameters that it does not count."""
    foreign = {f.name: f for f in fields(LoraConfig)}.keys() - set(BESIDE_BUDGET)
    given = sorted(name for name in foreign if options.get(name) not in (None, False, "none", {}, []))
    if given:
        names = ", ".join(f"`{name}`" for name in given)
        raise ValueError(
            f"{names} cannot be given beside `budget_percent`: the budget decides ranks, scalings and matrices, and "
            "counts the parameters of updates s B A alone; leave it out (`scaling` sets s), or give no budget"
        )


def wrap_with_peft(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Call ``peft.get_peft_model`` without a warning about a name that PEFT 0.21 still uses."""
    with warnings.catch_warnings():
        # PEFT 0.21 uses transformers' deprecated `is_gradient_checkpointing`; the result is correct.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)
