"""Fisher-Weighted LoRA: LoRA whose updates shrink where the frozen weights receive little gradient."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwlora.adalora import AdaLora, AdaLoraPlan, attach_adalora, plan_adalora
    from fwlora.adapters import AdapterPair, find_adapter_pairs
    from fwlora.architectures import find_target_matrices
    from fwlora.budget import MatrixShape, budget_parameters, solve_ranks
    from fwlora.config import FwLoraConfig, RankPlan, attach_lora, plan_ranks
    from fwlora.options import FisherWeighting
    from fwlora.regularizer import FisherWeightedLora
    from fwlora.trainer import AdaLoraCallback, FwLoraCallback

__version__ = "0.1.0"

# Loaded on first use: importing PEFT takes seconds, and tools that only read settings do without.
_HOMES = {
    "AdaLora": "fwlora.adalora",
    "AdaLoraCallback": "fwlora.trainer",
    "AdaLoraPlan": "fwlora.adalora",
    "AdapterPair": "fwlora.adapters",
    "FisherWeightedLora": "fwlora.regularizer",
    "FisherWeighting": "fwlora.options",
    "FwLoraCallback": "fwlora.trainer",
    "FwLoraConfig": "fwlora.config",
    "MatrixShape": "fwlora.budget",
    "RankPlan": "fwlora.config",
    "attach_adalora": "fwlora.adalora",
    "attach_lora": "fwlora.config",
    "budget_parameters": "fwlora.budget",
    "find_adapter_pairs": "fwlora.adapters",
    "find_target_matrices": "fwlora.architectures",
    "plan_adalora": "fwlora.adalora",
    "plan_ranks": "fwlora.config",
    "solve_ranks": "fwlora.budget",
}

__all__ = [
    "AdaLora",
    "AdaLoraCallback",
    "AdaLoraPlan",
    "AdapterPair",
    "FisherWeightedLora",
    "FisherWeighting",
    "FwLoraCallback",
    "FwLoraConfig",
    "MatrixShape",
    "RankPlan",
    "__version__",
    "attach_adalora",
    "attach_lora",
    "budget_parameters",
    "find_adapter_pairs",
    "find_target_matrices",
    "plan_adalora",
    "plan_ranks",
    "solve_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
