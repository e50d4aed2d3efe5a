"""The bootstrap behind every interval, against loops, theory and scikit-learn."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fwlora.experiment.evaluation.compare import bootstrap as resampling
from fwlora.experiment.evaluation.compare.bootstrap import (
    percentile_interval,
    resample_runs,
    resample_scores,
)
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.tracking import task_metrics
from tests.helpers import evaluation_records as records

SKLEARN = {
    "accuracy": accuracy_score,
    "matthews_correlation": matthews_corrcoef,
    "f1": lambda y, p: f1_score(y, p, average="binary" if y.max() < 2 and p.max() < 2 else "macro", zero_division=0.0),
}


def example_predictions(seed: int, rows: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labels, np.where(rng.random((rows, count)) < 0.75, labels, rng.integers(0, classes, (rows, count)))


@pytest.mark.parametrize("name", list(SKLEARN))
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_confusion_metrics_equal_scikit_learn(name: str, classes: int):
    labels, predictions = example_predictions(classes, 4, 57, classes)
    confusion = np.stack([resampling.confusion_matrix(labels, row, classes) for row in predictions])
    expected = [SKLEARN[name](labels, row) for row in predictions]
    np.testing.assert_allclose(task_metrics.score_confusion(name, confusion), expected, atol=1e-12)


def test_matthews_of_constant_predictions_is_zero():
    assert task_metrics.matthews_from_confusion(np.array([[3, 0], [4, 0]])) == 0.0


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_equal_a_loop_over_the_same_resamples(classes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resampling, "_CHUNK", 70)
    labels, predictions = example_predictions(7, 3, 40, classes)
    names, resamples = ["matthews_correlation", "accuracy"], 200
    got = resample_scores(labels, predictions, names, classes, np.random.default_rng(5), resamples)
    # Replaying the Generator gives how often each example was drawn; the loop writes the examples out again.
    rng = np.random.default_rng(5)
    counts = np.concatenate([rng.multinomial(40, np.full(40, 1 / 40), size=size) for size in (70, 70, 60)])
    assert counts.shape == (resamples, 40) and np.all(counts.sum(axis=1) == 40)
    for name in names:
        expected = [[SKLEARN[name](np.repeat(labels, row), np.repeat(p, row)) for row in counts] for p in predictions]
        np.testing.assert_allclose(got[name], expected, atol=1e-12)


def test_interval_over_examples_has_the_width_that_theory_gives():
    rng = np.random.default_rng(3)
    labels = np.zeros(1000, dtype=int)
    predictions = (rng.random((2, 1000)) < 0.2).astype(int)
    scores = resample_scores(labels, predictions, ["accuracy"], 2, rng)["accuracy"]
    low, high = percentile_interval(scores[0] - scores[1])
    standard_error = np.std((predictions[0] == labels).astype(float) - (predictions[1] == labels)) / math.sqrt(1000)
    assert (high - low) / (2 * 1.96 * standard_error) == pytest.approx(1.0, abs=0.05)


def test_runs_of_a_split_share_its_resamples_whoever_else_is_there():
    runs = read_runs(
        [records.make_record("a"), records.make_record("b", seed=2), records.make_record("c", subset="cola")]
    )
    together = resample_runs(runs, rng_seed=1, resamples=300)
    alone = resample_runs(runs[1:2], rng_seed=1, resamples=300)
    np.testing.assert_array_equal(together.scores["b", "accuracy"], alone.scores["b", "accuracy"])
    # On the same resamples the two runs' scores move together; on other ones they would not.
    labels, table = runs[0].labels, np.stack([run.predictions for run in runs])
    rng = np.random.default_rng([1, zlib.crc32(labels.tobytes())])
    expected = resample_scores(labels, table, ["accuracy", "matthews_correlation"], 2, rng, 300)
    for row, run_id in enumerate("abc"):
        np.testing.assert_array_equal(
            together.scores[run_id, "matthews_correlation"], expected["matthews_correlation"][row]
        )
    assert together.stack(runs[:2], "accuracy").shape == (2, 300)
    other = resample_runs(runs, rng_seed=2, resamples=300)
    assert not np.array_equal(other.scores["a", "accuracy"], together.scores["a", "accuracy"])


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (2, 0)])
def test_shapes_must_fit(shape):
    labels = np.zeros(3 if shape[1] else 0, dtype=int)
    with pytest.raises(ValueError, match=r"`predictions` has shape .* n > 0 is needed"):
        resample_scores(labels, np.zeros(shape, dtype=int), ["accuracy"], 2, np.random.default_rng())
    with pytest.raises(ValueError, match="same shape"):
        resampling.confusion_matrix(np.zeros(3, dtype=int), np.zeros(4, dtype=int), 2)
