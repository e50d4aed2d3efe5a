"""Paired tests and intervals over test examples and over seeds: arrays and a Generator in, plain numbers out.

Two sources of variance are kept apart. *Examples*: another test split of the same size would give another value of
the same run. *Seeds*: another initialisation and data order would give another run. A test over examples says nothing
about other seeds, and one pair of runs allows no test over seeds at all.

Sources: McNemar, Psychometrika 12 (1947); Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13;
Holm, Scand. J. Statist. 6 (1979); Gorodkin, Comput. Biol. Chem. 28 (2004) for the K-class correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

RESAMPLES = 10_000
CONFIDENCE = 0.95
EXACT_SIGN_FLIP_LIMIT = 16  # 2^16 sign patterns are enumerated; above that they are sampled
SIGN_FLIP_SAMPLES = 99_999
_CHUNK = 1_000  # resamples held in memory at once


@dataclass(frozen=True)
class McNemarResult:
    """Exact McNemar test of two classifiers on the same examples.

    Attributes:
        only_first_correct: examples that only the first classifier got right.
        only_second_correct: examples that only the second got right.
        p_value: two-sided; 1 where the two never disagree in correctness.
    """

    only_first_correct: int
    only_second_correct: int
    p_value: float


@dataclass(frozen=True)
class Interval:
    """A difference (first minus second) and its percentile bootstrap interval at :data:`CONFIDENCE`."""

    difference: float
    low: float
    high: float


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
    """

    count: int
    mean: float
    standard_deviation: float | None
    wins: int
    t_statistic: float | None
    t_p_value: float | None
    sign_flip_p_value: float | None
    sign_flip_smallest_p_value: float | None


def mcnemar_exact(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> McNemarResult:
    """Exact (binomial) McNemar test for accuracy.

    Under the null hypothesis an example that only one classifier gets right is as likely to be either's, so
    ``b ~ Binomial(b + c, 1/2)``.

    Args:
        labels: gold classes, shape ``(n,)``.
        first, second: predicted classes, shape ``(n,)`` each, in the order of ``labels``.

    Raises:
        ValueError: shapes that differ.
    """
    _require_same_shape(labels, first, second)
    only_first = int(np.sum((first == labels) & (second != labels)))
    only_second = int(np.sum((first != labels) & (second == labels)))
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemarResult(only_first, only_second, p_value)


def accuracy_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Accuracy of each confusion matrix: shape ``(..., K, K)`` (gold rows, predicted columns) to ``(...)``."""
    counts = np.asarray(confusion, dtype=np.float64)
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def matthews_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Matthews correlation of each confusion matrix: shape ``(..., K, K)`` to ``(...)``.

    ``R_K = (c s - Σ_k p_k t_k) / sqrt((s² - Σ p_k²)(s² - Σ t_k²))`` with s examples, c of them right, t_k of gold and
    p_k of predicted class k. 0 where a constant column or row leaves it undefined, as in scikit-learn.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    total = counts.sum(axis=(-2, -1))
    gold, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    numerator = np.trace(counts, axis1=-2, axis2=-1) * total - (gold * predicted).sum(axis=-1)
    spread = (total**2 - (predicted**2).sum(axis=-1)) * (total**2 - (gold**2).sum(axis=-1))
    return np.divide(numerator, np.sqrt(spread), out=np.zeros_like(numerator), where=spread > 0)


def f1_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """F1 of each confusion matrix: of class 1 for two classes, else the macro average; ``(..., K, K)`` to ``(...)``."""
    counts = np.asarray(confusion, dtype=np.float64)
    support = counts.sum(axis=-1) + counts.sum(axis=-2)
    hits = 2.0 * np.diagonal(counts, axis1=-2, axis2=-1)
    per_class = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    return per_class[..., 1] if counts.shape[-1] == 2 else per_class.mean(axis=-1)


CONFUSION_METRICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy_from_confusion,
    "matthews_correlation": matthews_from_confusion,
    "f1": f1_from_confusion,
}


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of shape ``(K, K)``, gold classes as rows and predicted ones as columns."""
    _require_same_shape(labels, predictions)
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def resample_confusions(
    labels: np.ndarray,
    predictions: np.ndarray,
    num_classes: int,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Confusion matrices of several classifiers on bootstrap resamples of their common examples.

    Examples with equal (label, predictions) are interchangeable, so n draws with replacement are one multinomial draw
    over the distinct patterns. Every classifier sees the same resample, which is what keeps differences paired.

    Args:
        labels: gold classes, shape ``(n,)``.
        predictions: shape ``(M, n)``, one row per classifier.
        num_classes: K.
        rng: source of the resamples.
        resamples: R.

    Returns:
        Counts of shape ``(M, R, K, K)``.

    Raises:
        ValueError: shapes that do not fit, or no examples.
    """
    table = np.atleast_2d(predictions)
    _require_same_shape(labels, table[0])
    if labels.size == 0:
        raise ValueError("`labels` is empty; there is nothing to resample")
    patterns, counts = np.unique(np.vstack([labels, table]), axis=1, return_counts=True)
    cells = patterns[0] * num_classes + patterns[1:]
    indicators = np.eye(num_classes**2)[cells]  # (M, U, K²)
    out = np.empty((len(table), resamples, num_classes**2))
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        drawn = rng.multinomial(labels.size, counts / labels.size, size=size).astype(np.float64)
        out[:, start : start + size] = drawn @ indicators
    return out.reshape(len(table), resamples, num_classes, num_classes)


def paired_bootstrap(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    metric_names: Sequence[str],
    num_classes: int,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Difference between two groups of runs, with an interval over examples and, for several seeds, over seeds.

    For S >= 2 paired seeds the bootstrap is hierarchical: each resample draws S seeds with replacement, then one set
    of examples. All seeds are scored on that same set, because they share the test split: examples drawn afresh for
    every seed would average the examples' variance away.

    Args:
        labels: gold classes, shape ``(n,)``.
        first, second: predicted classes, shape ``(n,)`` or ``(S, n)``; row i of both has the same seed.
        metric_names: keys of :data:`CONFUSION_METRICS`; all are computed on the same resamples.
        num_classes: K.
        rng: source of all resamples.
        resamples: how many.

    Returns:
        For each metric the mean over seeds of metric(first) - metric(second) and its percentile interval.

    Raises:
        ValueError: shapes that differ.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    _require_same_shape(first, second)
    seeds = len(first)
    stacked = np.vstack([first, second])
    observed = np.stack([confusion_matrix(labels, row, num_classes) for row in stacked])
    drawn_seeds = rng.integers(0, seeds, size=(resamples, seeds)) if seeds > 1 else np.zeros((resamples, 1), dtype=int)
    confusions = resample_confusions(labels, stacked, num_classes, rng, resamples)
    intervals = {}
    for name in metric_names:
        metric = CONFUSION_METRICS[name]
        value = metric(observed)
        scores = metric(confusions)
        differences = (scores[:seeds] - scores[seeds:]).T  # (R, S)
        means = np.take_along_axis(differences, drawn_seeds, axis=1).mean(axis=1)
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        intervals[name] = Interval(float(np.mean(value[:seeds] - value[seeds:])), float(low), float(high))
    return intervals


def sign_flip_p_value(differences: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided permutation test that differences are symmetric about 0, with their mean as statistic.

    All 2^S sign patterns up to S = 16, above that 99,999 sampled ones (the observed one counted in).

    Args:
        differences: one per seed, shape ``(S,)``, S >= 2.
        rng: used above 16 seeds only.
    """
    values = np.asarray(differences, dtype=np.float64)
    exact = values.size <= EXACT_SIGN_FLIP_LIMIT
    result = stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else SIGN_FLIP_SAMPLES,
        rng=rng,
    )
    return float(result.pvalue)


def compare_seeds(differences: np.ndarray, rng: np.random.Generator) -> SeedTests:
    """Paired tests over seeds.

    Args:
        differences: first minus second, one per seed in which both were run, shape ``(S,)``.
        rng: for :func:`sign_flip_p_value`.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"`differences` must be finite and at least one, got {values.tolist()}")
    mean, wins = float(values.mean()), int(np.sum(values > 0))
    if values.size == 1:
        return SeedTests(1, mean, None, wins, None, None, None, None)
    # Differences of equal seeds that differ by rounding alone have no spread to test against.
    varies = np.ptp(values) > 1e-12 * max(1.0, np.abs(values).max())
    t_test = stats.ttest_1samp(values, 0.0) if varies else None
    smallest = 2.0 ** (1 - values.size) if values.size <= EXACT_SIGN_FLIP_LIMIT else 2.0 / (SIGN_FLIP_SAMPLES + 1)
    return SeedTests(
        count=int(values.size),
        mean=mean,
        standard_deviation=float(values.std(ddof=1)),
        wins=wins,
        t_statistic=float(t_test.statistic) if t_test else None,
        t_p_value=float(t_test.pvalue) if t_test else None,
        sign_flip_p_value=sign_flip_p_value(values, rng),
        sign_flip_smallest_p_value=smallest,
    )


def holm_adjust(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the given order: ``max over j <= i of min(1, (m - j) p_(j))``, j from 0."""
    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def _require_same_shape(*arrays: np.ndarray) -> None:
    shapes = {np.shape(array) for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"labels and predictions must have the same shape, got {sorted(shapes)}")
