"""What a comparison of methods gives, as values that tables, figures, the report and the documents share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fwlora.experiment.evaluation.compare.bootstrap import CONFIDENCE
from fwlora.experiment.evaluation.compare.hypothesis_tests import LEVEL, POWER, McNemarResult, SeedTests


@dataclass(frozen=True)
class _Remark:
    """A sentence about one cell, or about the evaluation as a whole.

    Attributes:
        cell: name of the cell; None for a remark about more than one cell.
        text: the sentence, without the cell's name.
    """

    cell: str | None
    text: str

    def __str__(self) -> str:
        return self.text if self.cell is None else f"{self.cell}: {self.text}"


@dataclass(frozen=True)
class ComparisonWarning(_Remark):
    """What makes a comparison unequal or its numbers doubtful."""


@dataclass(frozen=True)
class Reason(_Remark):
    """Why something was left out or not decided, or what would decide it."""


@dataclass(frozen=True)
class ExampleInterval:
    """A difference between two runs with its bootstrap interval over the evaluation examples.

    Attributes:
        difference: first run minus second, as a fraction.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedComparison:
    """Two runs of one seed.

    Attributes:
        seed: of both runs.
        first_run_id: run of the first method.
        second_run_id: run of the second method.
        mcnemar: test on the accuracy of the two runs; None where predictions are numbers.
        intervals: difference by task metric.
        mcnemar_p_value_holm: McNemar's p-value, corrected over all pairs and seeds; None without the test.
    """

    seed: int
    first_run_id: str
    second_run_id: str
    mcnemar: McNemarResult | None
    intervals: Mapping[str, ExampleInterval]
    mcnemar_p_value_holm: float | None = None


@dataclass(frozen=True)
class MeanDifference:
    """The mean over seeds of a difference between two methods.

    Attributes:
        tests: mean, tests and effect size over seeds.
        low: lower end of the bootstrap interval.
        high: upper end of the bootstrap interval.
        interval_over: what the interval covers: ``seeds and examples`` or ``examples``.
    """

    tests: SeedTests
    low: float
    high: float
    interval_over: str


@dataclass(frozen=True)
class TimeRatio:
    """Training time of the first method over that of the second: a geometric mean over seeds.

    Attributes:
        ratio: None where it was not measured.
        low: lower end of Student's interval; None for one seed.
        high: upper end of Student's interval; None for one seed.
        reason: why there is no ratio; None where there is one.
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class PairComparison:
    """The proposed method against another one in one cell.

    Attributes:
        cell: name of the cell.
        first: label of the proposed method.
        second: label of the other method.
        second_is: whether the other method is a baseline or the control.
        primary_metric: the task metric that is compared, such as ``accuracy``.
        seeds: those that both methods were run with, ascending; empty where there are none.
        seed_level_test: which tests over seeds were made, or why none is possible.
        per_seed: one entry for each of ``seeds``.
        over_seeds: mean difference by task metric; empty without seeds.
        improvement_rate: relative improvement of the mean; None where the second mean is not positive.
        training_time_ratio: None without seeds.
        t_p_value_holm: p-value of the paired t-test on the primary metric, corrected over all pairs.
        sign_flip_p_value_holm: that of the sign-flip test.
    """

    cell: str
    first: str
    second: str
    second_is: Literal["baseline", "control"]
    primary_metric: str
    seeds: tuple[int, ...]
    seed_level_test: str
    per_seed: tuple[SeedComparison, ...] = ()
    over_seeds: Mapping[str, MeanDifference] | None = None
    improvement_rate: float | None = None
    training_time_ratio: TimeRatio | None = None
    t_p_value_holm: float | None = None
    sign_flip_p_value_holm: float | None = None

    @property
    def primary(self) -> MeanDifference | None:
        """The mean difference of the primary metric; None without seeds."""
        return None if self.over_seeds is None else self.over_seeds[self.primary_metric]


@dataclass(frozen=True)
class PooledComparison:
    """The proposed method against another one, over all cells that have both.

    Attributes:
        first: label of the proposed method.
        second: label of the other method.
        cells: names of the cells.
        pairs: number of paired runs in all cells.
        mean: mean difference of the primary metric, as a fraction; every cell has the same weight.
        low: lower end of the bootstrap interval.
        high: upper end of the bootstrap interval.
        interval_over: what the interval covers.
        left_out: cells and seeds that do not count, with the reasons.
        test: name of the test, or why none is possible.
        p_value: runs of one data set and seed flip together; None without a test.
        p_value_independent: every difference flips by itself; None without a test.
        p_value_holm: ``p_value`` corrected over all pairs of methods.
    """

    first: str
    second: str
    cells: tuple[str, ...]
    pairs: int
    mean: float
    low: float
    high: float
    interval_over: str
    left_out: tuple[Reason, ...]
    test: str
    p_value: float | None = None
    p_value_independent: float | None = None
    p_value_holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Every paired comparison of an evaluation.

    Attributes:
        resamples: number of bootstrap resamples.
        rng_seed: of all resampling.
        pairs: each proposed method against each other one, cell by cell.
        pooled: each pair of methods over all cells.
        confidence: coverage of all intervals.
        level: significance level of all tests.
        power: at which minimum detectable differences are computed.
    """

    resamples: int
    rng_seed: int
    pairs: tuple[PairComparison, ...]
    pooled: tuple[PooledComparison, ...]
    confidence: float = CONFIDENCE
    level: float = LEVEL
    power: float = POWER
