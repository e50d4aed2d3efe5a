"""The task metrics: what runs are compared by, and how each is computed from predictions.

A metric of your own is one call of :func:`register_task_metric`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

ACCURACY = "accuracy"
MATTHEWS_CORRELATION = "matthews_correlation"
F1 = "f1"
# Compared in every cell, beside the task's own.
ALWAYS_COMPARED = (ACCURACY, MATTHEWS_CORRELATION)


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


@dataclass(frozen=True)
class TaskMetric:
    """A measure of predictions; a higher value is better.

    Attributes:
        name: in records, such as ``matthews_correlation``.
        label: in tables and figures.
        predicts: ``classes`` or ``numbers``, what the metric is defined for.
        from_predictions: value from labels and predictions, shape ``(n,)`` each, and the number of classes.
        from_confusion: values, shape ``(...)``, from confusion matrices, shape ``(..., K, K)`` with gold rows, for the
            bootstrap; a metric of numbers has none.
    """

    name: str
    label: str
    predicts: Literal["classes", "numbers"]
    from_predictions: Callable[[np.ndarray, np.ndarray, int], float]
    from_confusion: Callable[[np.ndarray], np.ndarray] | None = None


# In the order in which documents list them.
TASK_METRICS: dict[str, TaskMetric] = {}


def register_task_metric(metric: TaskMetric) -> None:
    """Add a task metric.

    Raises:
        ValueError: another metric has the name, or ``from_confusion`` is missing or surplus.
    """
    if TASK_METRICS.get(metric.name, metric) != metric:
        raise ValueError(f"`name` {metric.name!r} is taken by {TASK_METRICS[metric.name]}; choose another")
    if (metric.predicts == "classes") != (metric.from_confusion is not None):
        raise ValueError(f"{metric.name}: give `from_confusion` for a metric of classes, and for no other")
    TASK_METRICS[metric.name] = metric


def unregister_task_metric(name: str) -> None:
    """Remove a task metric, if it is registered."""
    TASK_METRICS.pop(name, None)


register_task_metric(TaskMetric(ACCURACY, "accuracy", "classes", compute_accuracy, accuracy_from_confusion))
register_task_metric(
    TaskMetric(MATTHEWS_CORRELATION, "Matthews correlation", "classes", compute_matthews, matthews_from_confusion)
)
register_task_metric(TaskMetric(F1, "F1", "classes", compute_f1, f1_from_confusion))


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
