"""What a claim can be about: one entry for each measure, with its unit.

A measure of your own is one :class:`Measure` and one call of :func:`register_measure`. Claim files can then name it,
and verdicts, tables, documents and the report show it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.contrasts import (
    Contrast,
    ImportanceHalf,
    Sample,
    sample_cost,
    sample_quality,
    sample_update_norm,
)


class Unit(ABC):
    """How values of a contrast are shown, and what its bounds may be.

    Attributes:
        name: in ``claims.json``.
        suffix: written behind the last number of a bound or value.
        neutral: the shown value of no difference.
        has_sign_flips: whether sign flips are tested over several data sets, beside Student's t.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    neutral: ClassVar[float]
    has_sign_flips: ClassVar[bool]

    @abstractmethod
    def to_scale(self, value: float) -> float:
        """Convert a shown value to the scale on which contrasts are computed."""

    @abstractmethod
    def from_scale(self, value: float) -> float:
        """Convert a contrast to the value that is shown."""

    @abstractmethod
    def to_axis(self, value: float) -> float:
        """Convert a shown value to the axis on which it is drawn."""

    @abstractmethod
    def format(self, value: float) -> str:
        """Write a shown value without its suffix."""

    @abstractmethod
    def format_contrast(self, weights: Mapping[str, float]) -> str:
        """Write a contrast in words.

        Args:
            weights: by label of the method.
        """

    @abstractmethod
    def check_bound(self, bound: float) -> None:
        """Check that a claim may have this bound.

        Raises:
            ValueError: no value of this unit can keep to it.
        """


class Points(Unit):
    """Hundredths of a metric; contrasts are differences of fractions."""

    name = "points"
    suffix = " points"
    neutral = 0.0
    has_sign_flips = True

    def to_scale(self, value: float) -> float:
        """Divide by 100."""
        return value / 100

    def from_scale(self, value: float) -> float:
        """Multiply by 100."""
        return 100 * value

    def to_axis(self, value: float) -> float:
        """Return the value itself."""
        return float(value)

    def format(self, value: float) -> str:
        """Write the sign and two decimals."""
        return f"{value:+.2f}"

    def format_contrast(self, weights: Mapping[str, float]) -> str:
        """Write ``FW-LoRA − 0.8 × AdaLoRA``."""
        return _format_sum(weights)

    def check_bound(self, bound: float) -> None:
        """Accept every bound."""


class Ratio(Unit):
    """A ratio of two values; contrasts are differences of logarithms."""

    name = "ratio"
    suffix = ""
    neutral = 1.0
    has_sign_flips = False

    def to_scale(self, value: float) -> float:
        """Take the natural logarithm."""
        return math.log(value)

    def from_scale(self, value: float) -> float:
        """Take the exponential."""
        return math.exp(value)

    def to_axis(self, value: float) -> float:
        """Take the natural logarithm."""
        return math.log(value)

    def format(self, value: float) -> str:
        """Write four decimals."""
        return f"{value:.4f}"

    def format_contrast(self, weights: Mapping[str, float]) -> str:
        """Write ``FW-LoRA / LoRA``, or the exponential of a sum for other weights."""
        return " / ".join(weights) if list(weights.values()) == [1, -1] else f"exp({_format_sum(weights)})"

    def check_bound(self, bound: float) -> None:
        """Check that the bound is positive.

        Raises:
            ValueError: it is not.
        """
        if bound <= 0:
            raise ValueError("a bound of a ratio must be positive")


def _format_sum(weights: Mapping[str, float]) -> str:
    parts = [
        f"{'−' if weight < 0 else '+'} {f'{abs(weight):g} × ' if abs(weight) != 1 else ''}{label}"
        for label, weight in weights.items()
    ]
    return " ".join(parts).removeprefix("+ ")


@dataclass(frozen=True)
class Measure:
    """What a contrast between methods is made of.

    Attributes:
        name: the value of ``measure`` in claim files.
        unit: of bounds and shown values.
        description: for the report; ``{half}`` stands for ``low`` or ``high`` where claims name modules.
        sample: computes the contrast in one cell from the cell, the weights of its groups, the resampled scores and
            the half of the modules, on the unit's scale.
        needs_modules: whether claims have to name a half of the modules; others must not.
    """

    name: str
    unit: Unit
    description: str
    sample: Callable[[Cell, Contrast, ResampledRuns, ImportanceHalf | None], Sample]
    needs_modules: bool = False


_MEASURES: dict[str, Measure] = {}


def register_measure(measure: Measure) -> None:
    """Add a measure.

    Raises:
        ValueError: another measure has its name.
    """
    if _MEASURES.get(measure.name, measure) is not measure:
        raise ValueError(f"`name` {measure.name!r} is taken by another measure; choose another")
    _MEASURES[measure.name] = measure


def unregister_measure(name: str) -> None:
    """Remove a measure, if it is registered."""
    _MEASURES.pop(name, None)


def known_measures() -> dict[str, Measure]:
    """Return all measures by name."""
    return dict(_MEASURES)


def find_measure(name: str) -> Measure:
    """Return a measure by its name.

    Raises:
        ValueError: no measure has it.
    """
    if name not in _MEASURES:
        raise ValueError(f"unknown measure; known: {', '.join(_MEASURES)}")
    return _MEASURES[name]


def _sample_quality(cell: Cell, contrast: Contrast, resampled: ResampledRuns, modules: ImportanceHalf | None) -> Sample:
    return sample_quality(cell, contrast, resampled)


def _sample_training_time(
    cell: Cell, contrast: Contrast, resampled: ResampledRuns, modules: ImportanceHalf | None
) -> Sample:
    return sample_cost(cell, contrast)


def _sample_update_norm(
    cell: Cell, contrast: Contrast, resampled: ResampledRuns, modules: ImportanceHalf | None
) -> Sample:
    assert modules is not None, "checked when the claim was read"
    return sample_update_norm(cell, contrast, modules)


register_measure(Measure("quality", Points(), "difference of the primary metric in points", _sample_quality))
register_measure(Measure("training_time", Ratio(), "ratio of training times", _sample_training_time))
register_measure(
    Measure(
        "update_norm",
        Ratio(),
        "ratio of the norms of updates, geometric mean over the modules of {half} importance",
        _sample_update_norm,
        needs_modules=True,
    )
)
