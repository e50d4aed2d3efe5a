"""Tests, effect sizes and power, as pure functions of arrays and a Generator.

A test over examples says nothing about other seeds, and one pair of runs allows no test over seeds at all.

Sources: McNemar, Psychometrika 12 (1947); Fisher, The Design of Experiments (1935), ch. 3, for sign flips; Holm, Scand.
J. Statist. 6 (1979); Hedges, J. Educ. Stat. 6 (1981); Satterthwaite, Biometrics Bull. 2 (1946).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

LEVEL = 0.05
POWER = 0.8
EXACT_SIGN_FLIP_LIMIT = 16  # 2^16 sign patterns are enumerated; above that they are sampled
SIGN_FLIP_SAMPLES = 99_999
ROUNDING = 1e-12  # differences below it are rounding errors
MAX_SEEDS = 1_000  # more than these are reported as "more than 1,000"
Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class McNemarResult:
    """Result of an exact McNemar test of two classifiers on the same examples.

    Attributes:
        only_first_correct: examples that only the first classifier got right.
        only_second_correct: examples that only the second got right.
        p_value: two-sided; 1 where the two never disagree in correctness.
    """

    only_first_correct: int
    only_second_correct: int
    p_value: float


@dataclass(frozen=True)
class SeedTests:
    """Tests on one difference per seed.

    Attributes:
        count: paired seeds.
        mean: mean difference.
        standard_deviation: with ``count - 1``; None for one seed.
        wins: seeds with a positive difference.
        t_statistic: None where it is undefined (one seed, or differences that do not vary).
        t_p_value: two-sided paired t-test; None likewise.
        sign_flip_p_value: two-sided; None for one seed.
        sign_flip_smallest_p_value: the smallest that this number of seeds allows: above 0.05 nothing can be rejected.
        hedges_g: mean over standard deviation, times Hedges' correction for few seeds, which leaves nothing of it for
            two; None likewise.
        minimum_detectable_difference: see :func:`minimum_detectable_difference`; None likewise.
    """

    count: int
    mean: float
    standard_deviation: float | None
    wins: int
    t_statistic: float | None = None
    t_p_value: float | None = None
    sign_flip_p_value: float | None = None
    sign_flip_smallest_p_value: float | None = None
    hedges_g: float | None = None
    minimum_detectable_difference: float | None = None


@dataclass(frozen=True)
class StratifiedMean:
    """The weighted mean over strata of their means, with its uncertainty over seeds.

    Attributes:
        strata: how many there are.
        estimate: ``Σ w_k mean_k``, weights summing to 1.
        deviation: of the mean for one seed in each stratum, ``sqrt(Σ w_k² s_k²)``; None where one has one value.
        standard_error: ``sqrt(Σ w_k² s_k² / n_k)``; None likewise.
        degrees_of_freedom: Satterthwaite's; None likewise, and where nothing varies.
    """

    strata: int
    estimate: float
    deviation: float | None
    standard_error: float | None
    degrees_of_freedom: float | None

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """Compute Student's t interval; None where there is no standard error."""
        if self.standard_error is None:
            return None
        reach = self.quantile(confidence) * self.standard_error
        return self.estimate - reach, self.estimate + reach

    def quantile(self, confidence: float) -> float:
        """Return Student's quantile of the interval; 0 where nothing varies."""
        return 0.0 if self.degrees_of_freedom is None else _t_quantile((1 + confidence) / 2, self.degrees_of_freedom)

    def p_value(self, bound: float, alternative: Literal["greater", "less"]) -> float | None:
        """Compute the p-value of a one-sided t-test against ``bound``; None where nothing varies."""
        if not self.standard_error or self.degrees_of_freedom is None:
            return None
        statistic = (self.estimate - bound) / self.standard_error
        tail = stats.t.sf if alternative == "greater" else stats.t.cdf
        return float(tail(statistic, self.degrees_of_freedom))


def mcnemar_exact(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> McNemarResult:
    """Test by McNemar's exact (binomial) test whether two accuracies differ.

    Under the null hypothesis an example that only one classifier gets right is as likely to be either's, so
    ``b ~ Binomial(b + c, 1/2)``.

    Args:
        labels: gold classes, shape ``(n,)``.
        first: classes that the first classifier predicts, shape ``(n,)``, in the order of ``labels``.
        second: classes that the second one predicts, likewise.

    Raises:
        ValueError: shapes that differ.
    """
    if not np.shape(labels) == np.shape(first) == np.shape(second):
        shapes = [np.shape(labels), np.shape(first), np.shape(second)]
        raise ValueError(f"labels and predictions must have the same shape, got {shapes}")
    only_first = int(np.sum((first == labels) & (second != labels)))
    only_second = int(np.sum((first != labels) & (second == labels)))
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemarResult(only_first, only_second, p_value)


def sign_flip_p_value(
    differences: np.ndarray,
    rng: np.random.Generator,
    alternative: Alternative = "two-sided",
    samples: int = SIGN_FLIP_SAMPLES,
) -> float:
    """Test by permutation that differences are symmetric about 0, with their mean as statistic.

    All 2^S sign patterns up to S = 16, above that sampled ones (the observed one counted in).

    Args:
        differences: one per seed, shape ``(S,)``.
        rng: used above 16 seeds only.
        alternative: what the differences are suspected to be.
        samples: sign patterns where not all are enumerated.
    """
    values = np.asarray(differences, dtype=np.float64)
    exact = values.size <= EXACT_SIGN_FLIP_LIMIT
    result = stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        alternative=alternative,
        vectorized=True,
        n_resamples=np.inf if exact else samples,
        rng=rng,
    )
    return float(result.pvalue)


def stratified_sign_flip_p_value(
    strata: Sequence[np.ndarray],
    rng: np.random.Generator,
    alternative: Alternative = "two-sided",
    samples: int = SIGN_FLIP_SAMPLES,
    blocks: Sequence[Sequence[Hashable]] | None = None,
) -> float:
    """Test several cells, whose differences may have unlike scales, by sign flips.

    The statistic is the mean over cells of ``mean(d_c) / sqrt(mean(d_c²))``: a flip leaves the denominator as it is, so
    the test stays exact, and a cell with large differences does not drown the others.

    Args:
        strata: per cell, one difference per seed.
        rng: used above 16 signs only.
        alternative: what the differences are suspected to be.
        samples: sign patterns where not all are enumerated.
        blocks: as ``strata``; differences of one block flip together, which holds where they may depend on each other.
            None: every difference flips by itself.

    Returns:
        The p-value; 1 where no difference differs from 0.
    """
    terms: dict[Hashable, float] = {}
    for stratum, values in enumerate(strata):
        scale = math.sqrt(float(np.mean(np.square(values))))
        for place, value in enumerate(values.tolist()):
            block = (stratum, place) if blocks is None else blocks[stratum][place]
            terms[block] = terms.get(block, 0.0) + (value / (scale * values.size) if scale > ROUNDING else 0.0)
    return sign_flip_p_value(np.array(list(terms.values())), rng, alternative, samples)


def stratified_mean(strata: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> StratifiedMean:
    """Compute the weighted mean over strata of their means, with its uncertainty over seeds.

    With one stratum, its test is Student's one-sample t-test.

    Args:
        strata: one value per seed, for each stratum.
        weights: of the strata; None: all alike.
    """
    shares = np.ones(len(strata)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    estimate = float(np.sum(shares * [values.mean() for values in strata]))
    if any(values.size < 2 for values in strata):
        return StratifiedMean(len(strata), estimate, None, None, None)
    # Values that are equal but for rounding have no spread to test against.
    varying = [(share, values) for share, values in zip(shares, strata, strict=True) if _varies(values)]
    of_one_seed = [float(share**2 * values.var(ddof=1)) for share, values in varying]
    variances = [variance / values.size for variance, (_, values) in zip(of_one_seed, varying, strict=True)]
    spreads = [variance**2 / (values.size - 1) for variance, (_, values) in zip(variances, varying, strict=True)]
    freedom = math.fsum(variances) ** 2 / math.fsum(spreads) if varying else None
    deviation, error = (math.sqrt(math.fsum(each)) for each in (of_one_seed, variances))
    return StratifiedMean(len(strata), estimate, deviation, error, freedom)


def _varies(values: np.ndarray) -> bool:
    return bool(np.ptp(values) > ROUNDING * max(1.0, float(np.abs(values).max())))


def compare_seeds(differences: np.ndarray, rng: np.random.Generator) -> SeedTests:
    """Compute paired tests over seeds, effect size and power.

    Args:
        differences: first minus second, one per seed in which both were run, shape ``(S,)``.
        rng: for :func:`sign_flip_p_value`.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"`differences` must be finite and at least one, got {values.tolist()}")
    mean, wins, count = float(values.mean()), int(np.sum(values > 0)), int(values.size)
    if count == 1:
        return SeedTests(1, mean, None, wins)
    varies = _varies(values)
    deviation = float(values.std(ddof=1))
    t_test = stats.ttest_1samp(values, 0.0) if varies else None
    smallest = smallest_sign_flip_p_value(count)
    return SeedTests(
        count=count,
        mean=mean,
        standard_deviation=deviation,
        wins=wins,
        t_statistic=float(t_test.statistic) if t_test else None,
        t_p_value=float(t_test.pvalue) if t_test else None,
        sign_flip_p_value=sign_flip_p_value(values, rng),
        sign_flip_smallest_p_value=smallest,
        hedges_g=mean / deviation * (1 - 3 / (4 * (count - 1) - 1)) if varies and count > 2 else None,
        minimum_detectable_difference=minimum_detectable_difference(deviation, count) if varies else None,
    )


def smallest_sign_flip_p_value(count: int) -> float:
    """Return the smallest two-sided p-value that sign flips of so many differences can reach."""
    return 2.0 ** (1 - count) if count <= EXACT_SIGN_FLIP_LIMIT else 2.0 / (SIGN_FLIP_SAMPLES + 1)


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return float(stats.norm.ppf(probability))


def minimum_detectable_difference(deviation: float, seeds: int) -> float:
    """Compute the true mean difference that a paired t-test at :data:`LEVEL` finds with probability :data:`POWER`.

    Args:
        deviation: standard deviation of the differences over seeds.
        seeds: paired seeds, at least 2.
    """
    return deviation * float(TTestPower().solve_power(nobs=seeds, alpha=LEVEL, power=POWER, alternative="two-sided"))


def seeds_needed(distance: float, deviation: float, strata: int = 1) -> int | None:
    """Compute seeds per cell with which a test at :data:`LEVEL` rejects a bound with probability :data:`POWER`.

    Args:
        distance: between the mean and the bound.
        deviation: of the mean over strata for one seed in each, ``sqrt(Σ w_k² s_k²)``.
        strata: how many; their seeds add degrees of freedom.

    Returns:
        The number, or None above :data:`MAX_SEEDS`.
    """
    if not distance:
        return None
    if not deviation:
        return 2

    def suffice(seeds: int) -> bool:
        power = float(TTestPower().power(abs(distance) / deviation, seeds, LEVEL, df=strata * (seeds - 1)))
        return power >= POWER or math.isnan(power)  # scipy's noncentral t returns NaN where the power is nearly 1

    if not suffice(MAX_SEEDS):
        return None
    return 2 + bisect.bisect_left(range(2, MAX_SEEDS), True, key=suffice)


def holm_adjust(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method: ``max over j <= i of min(1, (m - j) p_(j))``, j from 0.

    Args:
        p_values: of one family; None for a test that was not made, which does not count.

    Returns:
        Adjusted p-values in the order of ``p_values``, None where they are None.
    """
    known = [p_value for p_value in p_values if p_value is not None]
    adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if p_value is None else float(next(adjusted)) for p_value in p_values]


@lru_cache(maxsize=1_000)
def _t_quantile(probability: float, degrees_of_freedom: float) -> float:
    return float(stats.t.ppf(probability, degrees_of_freedom))
