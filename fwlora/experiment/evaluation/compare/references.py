"""What a run has to be better than: a prediction that does not look at the example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fwlora.experiment.evaluation.compare.bootstrap import confusion_matrix
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun
from fwlora.experiment.tracking import metrics, task_metrics


@dataclass(frozen=True)
class ConstantReference:
    """The constant prediction of highest score on a run's evaluation split.

    Attributes:
        value: its primary metric, as a fraction.
        name: of the class that it predicts; None where predictions are numbers.
    """

    value: float
    name: str | None

    def __str__(self) -> str:
        return "a constant prediction" if self.name is None else f"always predicting {self.name}"


def score_constant(run: EvaluatedRun) -> ConstantReference:
    """Score the best constant prediction by a run's primary metric; it is a correlation of 0 for numbers."""
    if not run.has_classes:
        return ConstantReference(0.0, None)
    count = len(run.label_names)
    scores = [
        float(
            task_metrics.score_confusion(
                run.primary, confusion_matrix(run.labels, np.full_like(run.labels, each), count)
            )
        )
        for each in range(count)
    ]
    best = int(np.argmax(scores))
    if scores[best] == min(scores):  # as for the Matthews correlation: the most frequent class stands for all
        best = int(np.bincount(run.labels, minlength=count).argmax())
    return ConstantReference(scores[best], run.label_names[best])


def has_learned(run: EvaluatedRun) -> bool:
    """Return whether a run scores better than every constant prediction."""
    return run.values[metrics.eval_name(run.primary)] > score_constant(run).value


def describe_reference(run: EvaluatedRun, low: float) -> str | None:
    """Describe a run that is not above the best constant prediction, or not shown to be; None for any other.

    Args:
        run: with its values.
        low: lower end of the interval of its primary metric over examples.
    """
    value, reference = run.values[metrics.eval_name(run.primary)], score_constant(run)
    if np.ptp(run.predictions) == 0:
        kind = "class" if run.has_classes else "number"
        return f"run {run.run_id} predicts one {kind} for every example (counted, not dropped)"
    compared = f"{run.primary} {value:.3f}, {{}} the {reference.value:.3f} of {reference}"
    if not has_learned(run):
        return f"run {run.run_id} did not learn: {compared.format('not above')} (counted, not dropped)"
    if low <= reference.value:
        return f"run {run.run_id} is not shown to have learned: {compared.format('within its interval')}"
    return None
