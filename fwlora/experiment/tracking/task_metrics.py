"""The task metrics: what runs are compared by, and how each is computed from predictions.

A metric of your own is one call of :func:`register_task_metric`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Share of a variance that rounding may leave of a constant.
_ROUNDING = 1e-12

ACCURACY = "accuracy"
MATTHEWS_CORRELATION = "matthews_correlation"
F1 = "f1"
PEARSON_CORRELATION = "pearson_correlation"
SPEARMAN_CORRELATION = "spearman_correlation"

# What a metric is defined for: one of several classes, or a number.
Predicted = Literal["classes", "numbers"]
# Compared in every cell, beside the task's own metric.
ALWAYS_COMPARED: dict[Predicted, tuple[str, str]] = {
    "classes": (ACCURACY, MATTHEWS_CORRELATION),
    "numbers": (PEARSON_CORRELATION, SPEARMAN_CORRELATION),
}


def accuracy_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Compute the accuracy of each confusion matrix: shape ``(..., K, K)``, gold rows, to ``(...)``."""
    counts = np.asarray(confusion, dtype=np.float64)
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def matthews_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Compute the Matthews correlation of each confusion matrix: shape ``(..., K, K)`` to ``(...)``.

    ``R_K = (c s - Σ_k p_k t_k) / sqrt((s² - Σ p_k²)(s² - Σ t_k²))`` with s examples, c of them right, t_k of gold and
    p_k of predicted class k (Gorodkin, Comput. Biol. Chem. 28, 2004). 0 where a constant column or row leaves it
    undefined, as in scikit-learn.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    total = counts.sum(axis=(-2, -1))
    gold, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    numerator = np.trace(counts, axis1=-2, axis2=-1) * total - (gold * predicted).sum(axis=-1)
    spread = (total**2 - (predicted**2).sum(axis=-1)) * (total**2 - (gold**2).sum(axis=-1))
    return np.divide(numerator, np.sqrt(spread), out=np.zeros_like(numerator), where=spread > 0)


def f1_from_confusion(confusion: np.ndarray) -> np.ndarray:
    """Compute F1 of each confusion matrix: of class 1 for two classes, else the macro average.

    Args:
        confusion: counts, shape ``(..., K, K)``, gold classes as rows.

    Returns:
        Shape ``(...)``.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    support = counts.sum(axis=-1) + counts.sum(axis=-2)
    hits = 2.0 * np.diagonal(counts, axis1=-2, axis2=-1)
    per_class = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    return per_class[..., 1] if counts.shape[-1] == 2 else per_class.mean(axis=-1)


def compute_accuracy(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return the fraction of right predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def compute_matthews(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return the Matthews correlation; 0 where a constant prediction leaves it undefined."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def compute_f1(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return F1 of class 1 for two classes, else the macro average."""
    from sklearn.metrics import f1_score

    average = {"average": "binary"} if num_classes == 2 else {"average": "macro", "labels": range(num_classes)}
    return float(f1_score(labels, predictions, zero_division=0.0, **average))


def compute_pearson(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return the Pearson correlation; 0 where a constant leaves it undefined."""
    return float(pearson_from_counts(labels, predictions[None], np.ones((1, labels.size)))[0, 0])


def compute_spearman(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> float:
    """Return Spearman's rank correlation, ties by their mean rank; 0 where a constant leaves it undefined."""
    return float(spearman_from_counts(labels, predictions[None], np.ones((1, labels.size)))[0, 0])


def pearson_from_counts(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute the Pearson correlation of examples that count several times.

    ``r = Σ_i w_i x_i y_i / sqrt(Σ_i w_i x_i² · Σ_i w_i y_i²)`` with x and y minus their means under w. 0 where one of
    the sums of squares is 0.

    Args:
        labels: gold numbers, shape ``(n,)``.
        predictions: shape ``(M, n)``, a row per model.
        counts: how often each example counts, shape ``(R, n)``.

    Returns:
        Shape ``(M, R)``.
    """
    x = np.asarray(labels, dtype=np.float64) - np.mean(labels, dtype=np.float64)
    y = np.asarray(predictions, dtype=np.float64)
    y = y - y.mean(axis=1, keepdims=True)
    total = counts.sum(axis=1)
    mean_x, mean_y = counts @ x / total, y @ counts.T / total
    variance_x = counts @ x**2 / total - mean_x**2
    variance_y = y**2 @ counts.T / total - mean_y**2
    covariance = (y * x) @ counts.T / total - mean_x * mean_y
    # Of a constant, rounding leaves some units in the last place.
    defined = (variance_x > _ROUNDING * np.mean(x**2)) & (variance_y > _ROUNDING * np.mean(y**2, axis=1)[:, None])
    scale = np.sqrt(np.maximum(variance_x * variance_y, 0.0))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=defined)


def spearman_from_counts(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute Spearman's rank correlation of examples that count several times: Pearson's of their mean ranks.

    An example's mean rank is the count of smaller values plus half of (the count of equal values plus one).

    Args:
        labels: gold numbers, shape ``(n,)``.
        predictions: shape ``(M, n)``, a row per model.
        counts: how often each example counts, shape ``(R, n)``.

    Returns:
        Shape ``(M, R)``.
    """
    gold = _mean_ranks(labels, counts)
    values = np.empty((len(predictions), len(counts)))
    for row, predicted in enumerate(predictions):
        values[row] = _correlate_rows(gold, _mean_ranks(predicted, counts), counts)
    return values


def _mean_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rank values under counts: shapes ``(n,)`` and ``(R, n)`` to ``(R, n)``."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    equal = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(equal, axis=1) - equal + (equal + 1) / 2
    return np.take(ranks, place, axis=1)


def _correlate_rows(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation row by row: shapes ``(R, n)`` to ``(R,)``."""
    total = counts.sum(axis=1, keepdims=True)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    covariance = (counts * x * y).sum(axis=1)
    scale = np.sqrt((counts * x**2).sum(axis=1) * (counts * y**2).sum(axis=1))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


@dataclass(frozen=True)
class TaskMetric:
    """A measure of predictions; a higher value is better.

    Attributes:
        name: in records, such as ``matthews_correlation``.
        label: in texts and figures.
        predicts: ``classes`` or ``numbers``, what the metric is defined for.
        from_predictions: value from labels and predictions, shape ``(n,)`` each, and the number of classes.
        from_confusion: of a metric of classes, for the bootstrap: values, shape ``(...)``, from confusion matrices,
            shape ``(..., K, K)`` with gold rows.
        from_counts: of a metric of numbers, for the bootstrap: values, shape ``(M, R)``, from labels ``(n,)``,
            predictions ``(M, n)`` and how often each example counts, ``(R, n)``.
        short_label: in tables of papers, such as ``MCC``; empty where it is the label.
        average: how classes are averaged where there are more than two, written before the label; empty where the
            metric is defined for any number of classes.
    """

    name: str
    label: str
    predicts: Predicted
    from_predictions: Callable[[np.ndarray, np.ndarray, int], float]
    from_confusion: Callable[[np.ndarray], np.ndarray] | None = None
    from_counts: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None
    short_label: str = ""
    average: str = ""


# In the order in which documents list them.
TASK_METRICS: dict[str, TaskMetric] = {}


def register_task_metric(metric: TaskMetric) -> None:
    """Add a task metric.

    Raises:
        ValueError: another metric has the name, or the function that its bootstrap needs is missing, or the other one
            is given.
    """
    if TASK_METRICS.get(metric.name, metric) != metric:
        raise ValueError(f"`name` {metric.name!r} is taken by {TASK_METRICS[metric.name]}; choose another")
    of_classes = metric.predicts == "classes"
    if of_classes != (metric.from_confusion is not None) or of_classes == (metric.from_counts is not None):
        needed = "from_confusion" if of_classes else "from_counts"
        raise ValueError(f"{metric.name}: a metric of {metric.predicts} needs `{needed}`, and that alone")
    TASK_METRICS[metric.name] = metric


def unregister_task_metric(name: str) -> None:
    """Remove a task metric, if it is registered."""
    TASK_METRICS.pop(name, None)


def display_metric(name: str, num_classes: int = 2, short: bool = False) -> str:
    """Write a metric's name for people: ``matthews_correlation`` as ``Matthews correlation``, or as ``MCC``.

    Args:
        name: of the metric; one that is not registered is written with spaces.
        num_classes: of the data; F1 of more than two is ``macro F1``.
        short: as in tables of papers.
    """
    metric = TASK_METRICS.get(name)
    if metric is None:
        return name.replace("_", " ")
    label = (metric.short_label if short else "") or metric.label
    return f"{metric.average} {label}" if metric.average and num_classes > 2 else label


register_task_metric(
    TaskMetric(ACCURACY, "accuracy", "classes", compute_accuracy, accuracy_from_confusion, short_label="Acc.")
)
register_task_metric(
    TaskMetric(
        MATTHEWS_CORRELATION,
        "Matthews correlation",
        "classes",
        compute_matthews,
        matthews_from_confusion,
        short_label="MCC",
    )
)
register_task_metric(TaskMetric(F1, "F1", "classes", compute_f1, f1_from_confusion, average="macro"))
register_task_metric(
    TaskMetric(
        PEARSON_CORRELATION,
        "Pearson correlation",
        "numbers",
        compute_pearson,
        from_counts=pearson_from_counts,
        short_label="Pearson",
    )
)
register_task_metric(
    TaskMetric(
        SPEARMAN_CORRELATION,
        "Spearman correlation",
        "numbers",
        compute_spearman,
        from_counts=spearman_from_counts,
        short_label="Spearman",
    )
)


def list_compared(primary: str) -> tuple[str, ...]:
    """List the metrics that are compared where ``primary`` is the task's own: it, then those of every such task."""
    return tuple(dict.fromkeys((primary, *ALWAYS_COMPARED[TASK_METRICS[primary].predicts])))


def shown_beside(primary: str) -> str:
    """Return the metric that is shown beside the task's own: accuracy of classes, Spearman's correlation of numbers."""
    return ACCURACY if TASK_METRICS[primary].predicts == "classes" else SPEARMAN_CORRELATION


def compute_task_metrics(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> dict[str, float]:
    """Return every task metric of one split by name, as fractions.

    Args:
        labels: gold classes or numbers, shape ``(n,)``.
        predictions: predicted ones, shape ``(n,)``.
        num_classes: 1 where labels are numbers.
    """
    predicts = "numbers" if num_classes == 1 else "classes"
    chosen = [metric for metric in TASK_METRICS.values() if metric.predicts == predicts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {metric.name: metric.from_predictions(labels, predictions, num_classes) for metric in chosen}


def score_confusion(name: str, confusion: np.ndarray) -> np.ndarray:
    """Return a metric of classes for each confusion matrix: shape ``(..., K, K)``, gold rows, to ``(...)``.

    Raises:
        ValueError: a metric that is not registered, or one of numbers.
    """
    metric = TASK_METRICS.get(name)
    if metric is None or metric.from_confusion is None:
        raise ValueError(f"{name!r} is no metric of classes; register it with register_task_metric")
    return metric.from_confusion(confusion)


def score_counts(name: str, labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return a metric of numbers where examples count several times: ``(n,)``, ``(M, n)``, ``(R, n)`` to ``(M, R)``.

    Raises:
        ValueError: a metric that is not registered, or one of classes.
    """
    metric = TASK_METRICS.get(name)
    if metric is None or metric.from_counts is None:
        raise ValueError(f"{name!r} is no metric of numbers; register it with register_task_metric")
    return metric.from_counts(labels, predictions, counts)
