"""Task metrics by hand, and one of a third party."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from fwlora.experiment.data.glue import find_task_metric, known_tasks
from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.output.aggregate import aggregate
from fwlora.experiment.tracking import task_metrics
from fwlora.experiment.tracking.task_metrics import (
    TASK_METRICS,
    TaskMetric,
    compute_task_metrics,
    display_metric,
    list_compared,
    register_task_metric,
    score_confusion,
    score_counts,
    shown_beside,
    unregister_task_metric,
)
from tests.helpers.evaluation_records import change, make_record

LABELS, PREDICTIONS = np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])
CONFUSION = np.array([[1, 0], [1, 2]])
EXPECTED = {"accuracy": 3 / 4, "matthews_correlation": 1 / np.sqrt(3), "f1": 4 / 5}
OF_NUMBERS = ["pearson_correlation", "spearman_correlation"]
RECALL = TaskMetric(
    "recall",
    "recall",
    "classes",
    lambda labels, predictions, num_classes: float(predictions[labels == 1].mean()),
    lambda confusion: confusion[..., 1, 1] / confusion[..., 1, :].sum(axis=-1),
)
ERROR = TaskMetric(
    "error",
    "mean error",
    "numbers",
    lambda labels, predictions, num_classes: -float(abs(labels - predictions).mean()),
    from_counts=lambda labels, predictions, counts: -abs(labels - predictions) @ counts.T / labels.size,
)


@pytest.fixture
def more_metrics() -> Iterator[None]:
    for metric in (RECALL, ERROR):
        register_task_metric(metric)
    yield
    for metric in (RECALL, ERROR):
        unregister_task_metric(metric.name)
    assert list(TASK_METRICS) == [*EXPECTED, *OF_NUMBERS]


def test_values_of_four_examples_from_predictions_and_from_their_confusion_matrix():
    computed = compute_task_metrics(LABELS, PREDICTIONS, 2)
    assert list(computed) == list(EXPECTED) and computed == pytest.approx(EXPECTED, abs=1e-15)
    for name, value in EXPECTED.items():
        assert score_confusion(name, np.stack([CONFUSION, CONFUSION])) == pytest.approx([value, value], abs=1e-15)


def test_f1_is_of_class_1_for_two_classes_and_the_average_for_three():
    assert compute_task_metrics(LABELS, PREDICTIONS, 3)["f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_every_task_is_scored_by_a_metric_of_the_table():
    assert {find_task_metric(task) for task in (*known_tasks(), None)} == {*EXPECTED, "pearson_correlation"}


def test_labels_are_those_of_the_table_and_else_the_name():
    names = (*EXPECTED, "some_other")
    assert [display_metric(name) for name in names] == ["accuracy", "Matthews correlation", "F1", "some other"]
    assert [display_metric(name, short=True) for name in names] == ["Acc.", "MCC", "F1", "some other"]
    of_three = [display_metric(name, 3, short) for name in ("f1", "accuracy") for short in (False, True)]
    assert of_three == ["macro F1", "macro F1", "accuracy", "Acc."]


@pytest.mark.usefixtures("more_metrics")
def test_a_metric_is_added_by_one_call():
    assert compute_task_metrics(LABELS, PREDICTIONS, 2) == pytest.approx({**EXPECTED, "recall": 2 / 3})
    assert compute_task_metrics(LABELS, PREDICTIONS, 1)["error"] == -0.25
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
    compute = task_metrics.compute_f1
    with pytest.raises(ValueError, match="`name` 'f1' is taken"):
        register_task_metric(TaskMetric("f1", "F1", "numbers", compute))
    with pytest.raises(ValueError, match="mine: a metric of classes needs `from_confusion`, and that alone"):
        register_task_metric(TaskMetric("mine", "mine", "classes", compute))
    with pytest.raises(ValueError, match="mine: a metric of classes needs `from_confusion`"):
        register_task_metric(replace(RECALL, name="mine", from_counts=ERROR.from_counts))
    with pytest.raises(ValueError, match="mine: a metric of numbers needs `from_counts`, and that alone"):
        register_task_metric(replace(RECALL, name="mine", predicts="numbers"))
    assert "mine" not in TASK_METRICS


def make_numbers(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Gold numbers with many ties, and the predictions of three models, one of them with ties as well."""
    rng = np.random.default_rng(0)
    labels = np.round(rng.uniform(0, 5, count) * 5) / 5
    noisy = labels + rng.normal(0, 1, (2, count))
    return labels.astype(np.float32), np.stack([*noisy, np.round(noisy[0])]).astype(np.float32)


def test_correlations_are_those_of_scipy():
    labels, predictions = make_numbers()
    for row in predictions:
        computed = compute_task_metrics(labels, row, 1)
        exact = labels.astype(float), row.astype(float)
        assert computed == pytest.approx(
            {
                "pearson_correlation": scipy.stats.pearsonr(*exact).statistic,
                "spearman_correlation": scipy.stats.spearmanr(*exact).statistic,
            },
            abs=1e-12,
        )


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_correlations_of_examples_that_count_several_times_are_those_of_repeated_examples(name: str):
    labels, predictions = make_numbers()
    counts = np.random.default_rng(1).multinomial(labels.size, np.full(labels.size, 1 / labels.size), size=5)
    scored = score_counts(name, labels, predictions, counts.astype(float))
    repeated = [
        [compute_task_metrics(np.repeat(labels, count), np.repeat(row, count), 1)[name] for count in counts]
        for row in predictions
    ]
    assert scored.shape == (3, 5) and scored == pytest.approx(np.array(repeated), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.8, -1e-3, 1e6])
def test_correlations_with_a_constant_are_zero(value: float):
    labels, predictions = make_numbers()
    constant = np.full_like(labels, value)
    assert set(compute_task_metrics(labels, constant, 1).values()) == {0.0}
    assert set(compute_task_metrics(constant, predictions[0], 1).values()) == {0.0}


def test_correlations_are_right_far_from_zero():
    labels, predictions = make_numbers()
    near = compute_task_metrics(labels, predictions[0], 1)
    far = compute_task_metrics(labels.astype(float) * 1e-4 + 1e4, predictions[0].astype(float) * 1e-4 - 1e4, 1)
    assert far == pytest.approx(near, abs=1e-6)


def test_what_is_compared_and_shown_beside_a_metric():
    assert list_compared("f1") == ("f1", "accuracy", "matthews_correlation")
    assert list_compared("matthews_correlation") == ("matthews_correlation", "accuracy")
    assert list_compared("pearson_correlation") == ("pearson_correlation", "spearman_correlation")
    assert (shown_beside("f1"), shown_beside("pearson_correlation")) == ("accuracy", "spearman_correlation")
