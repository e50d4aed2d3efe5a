"""Task metrics by hand, and one of a third party."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fwlora.experiment.data.glue import find_task_metric, known_tasks
from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.figures.style import display_metric
from fwlora.experiment.evaluation.output.aggregate import aggregate
from fwlora.experiment.tracking import task_metrics
from fwlora.experiment.tracking.task_metrics import (
    TASK_METRICS,
    TaskMetric,
    compute_task_metrics,
    register_task_metric,
    score_confusion,
    unregister_task_metric,
)
from tests.helpers.evaluation_records import change, make_record

LABELS, PREDICTIONS = np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])
CONFUSION = np.array([[1, 0], [1, 2]])
EXPECTED = {"accuracy": 3 / 4, "matthews_correlation": 1 / np.sqrt(3), "f1": 4 / 5}
RECALL = TaskMetric(
    "recall",
    "recall",
    "classes",
    lambda labels, predictions, num_classes: float(predictions[labels == 1].mean()),
    lambda confusion: confusion[..., 1, 1] / confusion[..., 1, :].sum(axis=-1),
)
ERROR = TaskMetric(
    "error", "mean error", "numbers", lambda labels, predictions, num_classes: -float(abs(labels - predictions).mean())
)


@pytest.fixture
def more_metrics() -> Iterator[None]:
    for metric in (RECALL, ERROR):
        register_task_metric(metric)
    yield
    for metric in (RECALL, ERROR):
        unregister_task_metric(metric.name)
    assert list(TASK_METRICS) == list(EXPECTED)


def test_values_of_four_examples_from_predictions_and_from_their_confusion_matrix():
    computed = compute_task_metrics(LABELS, PREDICTIONS, 2)
    assert list(computed) == list(EXPECTED) and computed == pytest.approx(EXPECTED, abs=1e-15)
    for name, value in EXPECTED.items():
        assert score_confusion(name, np.stack([CONFUSION, CONFUSION])) == pytest.approx([value, value], abs=1e-15)


def test_f1_is_of_class_1_for_two_classes_and_the_average_for_three():
    assert compute_task_metrics(LABELS, PREDICTIONS, 3)["f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_every_task_is_scored_by_a_metric_of_the_table():
    assert {find_task_metric(task) for task in (*known_tasks(), None)} == set(EXPECTED)


def test_labels_are_those_of_the_table_and_else_the_name():
    shown = [display_metric(name) for name in (*EXPECTED, "some_other")]
    assert shown == ["accuracy", "Matthews correlation", "F1", "some other"]


@pytest.mark.usefixtures("more_metrics")
def test_a_metric_is_added_by_one_call():
    assert compute_task_metrics(LABELS, PREDICTIONS, 2) == pytest.approx({**EXPECTED, "recall": 2 / 3})
    assert compute_task_metrics(LABELS, PREDICTIONS, 1) == {"error": -0.25}
    assert score_confusion("recall", CONFUSION) == pytest.approx(2 / 3)
    assert display_metric("error") == "mean error"
    record = make_record("a")
    record = change(
        record,
        summary__final_eval_recall=0.25,
        summary__primary_metric="eval_recall",
        history=[{**row, "eval_recall": 0.25} for row in record.history],
    )
    evidence = gather_evidence([record], {}, resamples=10)
    assert (evidence.runs[0].primary, evidence.runs[0].values["eval_recall"]) == ("recall", 0.25)
    assert list(aggregate(evidence.cells, ())["metrics"])[:4] == [f"eval_{name}" for name in (*EXPECTED, "recall")]


@pytest.mark.usefixtures("more_metrics")
@pytest.mark.parametrize("name", ["error", "absent"])
def test_only_metrics_of_classes_have_confusion_matrices(name: str):
    with pytest.raises(ValueError, match=f"'{name}' is no metric of classes"):
        score_confusion(name, CONFUSION)


def test_metrics_that_cannot_be_registered():
    with pytest.raises(ValueError, match="`name` 'f1' is taken"):
        register_task_metric(TaskMetric("f1", "F1", "numbers", task_metrics.compute_f1))
    with pytest.raises(ValueError, match="mine: give `from_confusion`"):
        register_task_metric(TaskMetric("mine", "mine", "classes", task_metrics.compute_f1))
    with pytest.raises(ValueError, match="mine: give `from_confusion`"):
        register_task_metric(
            TaskMetric("mine", "mine", "numbers", task_metrics.compute_f1, task_metrics.f1_from_confusion)
        )
