"""Fisher-Weighted LoRA: LoRA whose updates shrink where the frozen weights receive little gradient."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwlora.budget import MatrixShape, budget_parameters, solve_ranks
    from fwlora.config import FisherWeighting, FwLoraConfig, plan_ranks
    from fwlora.methods import attach_adalora, attach_lora
    from fwlora.regularizer import FisherWeightedLora
    from fwlora.trainer import AdaLoraCallback, FwLoraCallback

__version__ = "0.1.0"

# Loaded on first use: importing PEFT takes seconds, which tools that only read settings should not wait for.
_HOMES = {
    "AdaLoraCallback": "fwlora.trainer",
    "FisherWeightedLora": "fwlora.regularizer",
    "FisherWeighting": "fwlora.config",
    "FwLoraCallback": "fwlora.trainer",
    "FwLoraConfig": "fwlora.config",
    "MatrixShape": "fwlora.budget",
    "attach_adalora": "fwlora.methods",
    "attach_lora": "fwlora.methods",
    "budget_parameters": "fwlora.budget",
    "plan_ranks": "fwlora.config",
    "solve_ranks": "fwlora.budget",
}

__all__ = [
    "AdaLoraCallback",
    "FisherWeightedLora",
    "FisherWeighting",
    "FwLoraCallback",
    "FwLoraConfig",
    "MatrixShape",
    "__version__",
    "attach_adalora",
    "attach_lora",
    "budget_parameters",
    "plan_ranks",
    "solve_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
