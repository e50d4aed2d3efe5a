"""Bootstrap over evaluation examples: another test split of the same size would give another value of the same run.

Resamples are shared by all runs of a split, which keeps every difference between two runs paired, whatever cells they
are in. What other seeds would give is estimated in :mod:`fwlora.experiment.evaluation.compare.contrasts`.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fwlora.experiment.evaluation.compare.runs import EvaluatedRun
from fwlora.experiment.tracking import task_metrics

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1_000  # resamples held in memory at once


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Count gold classes (rows) against predicted ones (columns).

    Args:
        labels: gold classes, shape ``(n,)``.
        predictions: predicted classes, shape ``(n,)``.
        num_classes: K.

    Returns:
        Shape ``(K, K)``.

    Raises:
        ValueError: shapes that differ.
    """
    if np.shape(labels) != np.shape(predictions):
        raise ValueError(
            f"labels and predictions must have the same shape, got {np.shape(labels)}, {np.shape(predictions)}"
        )
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def resample_scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    metric_names: Sequence[str],
    num_classes: int,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> dict[str, np.ndarray]:
    """Score several models on bootstrap resamples of their common examples.

    A resample is n draws with replacement, so the examples' counts are multinomial. Every model sees the same
    resamples; the draws depend on n and the Generator alone.

    Args:
        labels: gold classes or numbers, shape ``(n,)``.
        predictions: shape ``(M, n)``, one row per model.
        metric_names: keys of :data:`fwlora.experiment.tracking.task_metrics.TASK_METRICS`.
        num_classes: K; 0 where labels are numbers.
        rng: source of the resamples.
        resamples: R.

    Returns:
        For each metric, scores of shape ``(M, R)``.

    Raises:
        ValueError: shapes that do not fit, no examples, or a metric that does not fit the labels.
    """
    table = np.atleast_2d(predictions)
    if labels.size == 0 or table.shape[1:] != labels.shape:
        raise ValueError(f"`predictions` has shape {table.shape} for {labels.size} labels; (M, n) with n > 0 is needed")
    score = (
        partial(_score_classes, labels, table, num_classes) if num_classes else partial(_score_numbers, labels, table)
    )
    scores = {name: np.empty((len(table), resamples)) for name in metric_names}
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        counts = rng.multinomial(labels.size, np.full(labels.size, 1 / labels.size), size=size).astype(np.float64)
        for name, values in score(counts, metric_names).items():
            scores[name][:, start : start + size] = values
    return scores


def _score_classes(
    labels: np.ndarray, table: np.ndarray, num_classes: int, counts: np.ndarray, metric_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Score by confusion matrices, each a sum weighted by the examples' counts, shape ``(R, n)``."""
    cells = labels * num_classes + table  # (M, n)
    indicators = np.eye(num_classes**2)[cells.T].reshape(labels.size, -1)  # (n, M K²)
    confusions = (counts @ indicators).reshape(len(counts), len(table), num_classes, num_classes)
    return {name: task_metrics.score_confusion(name, confusions).T for name in metric_names}


def _score_numbers(
    labels: np.ndarray, table: np.ndarray, counts: np.ndarray, metric_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Score numbers under the examples' counts, shape ``(R, n)``."""
    return {name: task_metrics.score_counts(name, labels, table, counts) for name in metric_names}


@dataclass(frozen=True)
class ResampledRuns:
    """Scores of runs on resamples of their evaluation examples, the same resamples for all runs of a split.

    Attributes:
        scores: shape ``(R,)``, by run id and metric.
        resamples: R.
    """

    scores: Mapping[tuple[str, str], np.ndarray]
    resamples: int

    def stack(self, runs: Sequence[EvaluatedRun], metric: str) -> np.ndarray:
        """Stack the scores of these runs: shape ``(S, R)``."""
        return np.stack([self.scores[run.run_id, metric] for run in runs])


def resample_runs(runs: Sequence[EvaluatedRun], rng_seed: int, resamples: int = RESAMPLES) -> ResampledRuns:
    """Score every run by all metrics that are compared, on resamples that a split shares.

    The draws follow from ``rng_seed`` and the gold labels, so a run's scores do not depend on which others are here.
    """
    scores: dict[tuple[str, str], np.ndarray] = {}
    splits: dict[tuple[bytes, int], list[EvaluatedRun]] = {}  # by gold labels and number of classes
    for run in runs:
        splits.setdefault((run.labels.tobytes(), len(run.label_names)), []).append(run)
    for (gold, num_classes), members in splits.items():
        names = list(dict.fromkeys(name for run in members for name in task_metrics.list_compared(run.primary)))
        rng = np.random.default_rng([rng_seed, zlib.crc32(gold)])
        table = np.stack([run.predictions for run in members])
        resampled = resample_scores(members[0].labels, table, names, num_classes, rng, resamples)
        for row, run in enumerate(members):
            scores.update({(run.run_id, name): resampled[name][row] for name in names})
    return ResampledRuns(scores, resamples)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the central :data:`CONFIDENCE` of bootstrap values, shape ``(R,)``."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
