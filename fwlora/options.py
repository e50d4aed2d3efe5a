"""Options of the method, without torch; the only place of their defaults, ranges and names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeGuard, get_args

import numpy as np

EstimatorName = Literal["exact", "sketch", "adapter"]
Normalization = Literal["sum", "max", "mean", "none"]
Allocation = Literal["shrink", "reallocate"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
_STEPS = "give optimizer steps, a whole number of at least 1"


def _number(
    description: str,
    rule: str,
    *,
    ge: float,
    lt: float = math.inf,
    run_file_name: str | None = None,
    required: bool = False,
) -> dict[str, Any]:
    """Describe a number in [ge, lt); it is whole if the field's default is.

    Args:
        description: help of command lines.
        rule: end of the message about a value outside the range.
        ge: smallest value.
        lt: exclusive upper bound.
        run_file_name: key in run files of the experiment program; None for the field's own name.
        required: whether run files must give it.
    """
    metadata = {"ge": ge, "lt": lt, "run_file_name": run_file_name, "required": required}
    return {"help": description, "rule": rule, **metadata}


def _choice(description: str, choices: Sequence[str]) -> dict[str, Any]:
    return {"help": description, "rule": f"choose one of {', '.join(choices)}", "choices": tuple(choices)}


@dataclass
class FisherWeighting:
    r"""Options of :class:`fwlora.FisherWeightedLora`: how importances are measured and used.

    Attributes:
        strength: lambda >= 0 of the shrinkage term (``lambda_fw`` in run files); with 0 training is plain LoRA, unless
            ranks are reallocated.
        warmup_steps: K >= 1, optimizer steps before importances are frozen. Not the learning rate's warm-up.
        decay: beta in [0, 1) of the moving average F, per optimizer step (``fisher_alpha`` in run files).
        estimator: how ||grad W||_F^2 is measured, see :mod:`fwlora.estimators`: ``exact``, ``sketch``, or ``adapter``.
        sketch_size: k >= 1, columns of the random matrix; the estimate's variance falls as 1 / k.
        fisher_every: n >= 1, measure at the first optimizer step and then at every n-th, with beta^n, so that the
            average keeps its time constant.
        importance: how F becomes I, see :func:`fwlora.importance.normalize_importance`; ``none`` shrinks uniformly.
        allocation: ``shrink`` keeps every rank; ``reallocate`` also redistributes the ranks once, when the warm-up
            ends, within the parameters that they cost at the start (:func:`fwlora.budget.reallocate_ranks`).
        max_rank_factor: >= 1, with ``reallocate`` no matrix gets more than this times its initial rank, rounded up.
        seed: in [0, 2^63), of the sketches and of the rows that reallocation appends; torch's random state is not used.

    Raises:
        ValueError: fields outside their range, all of them in one message.
    """

    strength: float = field(
        default=1e-4,
        metadata=_number(
            "lambda of the shrinkage term, >= 0",
            "lambda is at least 0",
            ge=0,
            run_file_name="lambda_fw",
            required=True,
        ),
    )
    warmup_steps: int = field(
        default=500,
        metadata=_number("optimizer steps of measuring, >= 1", _STEPS, ge=1, required=True),
    )
    decay: float = field(
        default=0.98,
        metadata=_number(
            "factor of the moving average per optimizer step, in [0, 1)",
            "an averaging factor is in [0, 1)",
            ge=0,
            lt=1,
            run_file_name="fisher_alpha",
            required=True,
        ),
    )
    estimator: EstimatorName = field(
        default="sketch", metadata=_choice("exact, sketch or adapter", get_args(EstimatorName))
    )
    sketch_size: int = field(
        default=16,
        metadata=_number("columns of the sketch, >= 1", "give columns, a whole number of at least 1", ge=1),
    )
    fisher_every: int = field(
        default=1,
        metadata=_number("optimizer steps from one measurement to the next, >= 1", _STEPS, ge=1),
    )
    importance: Normalization = field(
        default="sum", metadata=_choice("sum, max, mean or none (uniform shrinkage)", NORMALIZATIONS)
    )
    allocation: Allocation = field(default="shrink", metadata=_choice("shrink or reallocate", get_args(Allocation)))
    max_rank_factor: float = field(
        default=2.0,
        metadata=_number("most a rank may grow by when reallocated, >= 1", "a factor of at least 1", ge=1),
    )
    seed: int = field(default=0, metadata=_number("of sketches and new directions", "0 to 2^63", ge=0, lt=2**63))

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Turn NumPy's numbers into Python's, and check every field against its range.

        Raises:
            ValueError: fields outside their range, each with its value and the range.
        """
        for option in fields(FisherWeighting):
            value = getattr(self, option.name)
            if isinstance(value, np.generic):
                setattr(self, option.name, value.item())
        wrong = [
            f"`{option.name}` is {getattr(self, option.name)!r}; {option.metadata['rule']}"
            for option in fields(FisherWeighting)
            if not _is_allowed(option, getattr(self, option.name))
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    def fisher_weighting(self) -> FisherWeighting:
        """Return these fields alone, as an independent copy."""
        return FisherWeighting(**{f.name: getattr(self, f.name) for f in fields(FisherWeighting)})


def _is_allowed(option: Field[Any], value: object) -> bool:
    if "choices" in option.metadata:
        return value in option.metadata["choices"]
    if not is_number(value) or (isinstance(option.default, int) and not isinstance(value, int)):
        return False
    return bool(option.metadata["ge"] <= value < option.metadata["lt"])


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether the value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
