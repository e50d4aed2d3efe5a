"""Fisher-Weighted LoRA: LoRA whose updates shrink where the frozen weights receive little gradient."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwlora.budget import MatrixShape, budget_parameters, solve_ranks
    from fwlora.methods import attach_adalora, attach_lora
    from fwlora.regularizer import FisherWeightedLora

__version__ = "0.1.0"

# Loaded on first use: importing PEFT takes seconds, which tools that only read settings should not wait for.
_HOMES = {
    "FisherWeightedLora": "fwlora.regularizer",
    "MatrixShape": "fwlora.budget",
    "attach_adalora": "fwlora.methods",
    "attach_lora": "fwlora.methods",
    "budget_parameters": "fwlora.budget",
    "solve_ranks": "fwlora.budget",
}

__all__ = [
    "FisherWeightedLora",
    "MatrixShape",
    "__version__",
    "attach_adalora",
    "attach_lora",
    "budget_parameters",
    "solve_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
