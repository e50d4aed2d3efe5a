"""Statistics against hand-computed cases, brute force and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fwlora.experiment import statistics

SKLEARN = {
    "accuracy": accuracy_score,
    "matthews_correlation": matthews_corrcoef,
    "f1": lambda y, p: f1_score(y, p, average="binary" if y.max() < 2 and p.max() < 2 else "macro", zero_division=0.0),
}


def example_predictions(seed: int, rows: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labels, np.where(rng.random((rows, count)) < 0.75, labels, rng.integers(0, classes, (rows, count)))


def test_mcnemar_of_a_hand_computed_case():
    labels = np.zeros(10, dtype=int)
    first = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 1])
    second = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 1])
    result = statistics.mcnemar_exact(labels, first, second)
    assert (result.only_first_correct, result.only_second_correct) == (5, 1)
    # Six coin tosses, five or more alike on either side: 2 (C(6,5) + C(6,6)) / 2^6 = 14/64.
    assert result.p_value == pytest.approx(14 / 64, abs=1e-12)


def test_mcnemar_without_disagreement_is_one():
    labels = np.array([0, 1, 1])
    assert statistics.mcnemar_exact(labels, labels, labels).p_value == 1.0


@pytest.mark.parametrize("name", list(SKLEARN))
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_confusion_metrics_equal_scikit_learn(name: str, classes: int):
    labels, predictions = example_predictions(classes, 4, 57, classes)
    confusion = np.stack([statistics.confusion_matrix(labels, row, classes) for row in predictions])
    expected = [SKLEARN[name](labels, row) for row in predictions]
    np.testing.assert_allclose(statistics.CONFUSION_METRICS[name](confusion), expected, atol=1e-12)


def test_matthews_of_constant_predictions_is_zero():
    assert statistics.matthews_from_confusion(np.array([[3, 0], [4, 0]])) == 0.0


@pytest.mark.parametrize("classes", [2, 3])
def test_bootstrap_equals_a_loop_over_the_same_resamples(classes: int):
    labels, predictions = example_predictions(7, 2, 40, classes)
    resamples = 300
    # Replaying the Generator gives the pattern counts of each resample; the loop writes the examples out again.
    patterns, counts = np.unique(np.vstack([labels, predictions]), axis=1, return_counts=True)
    drawn = np.random.default_rng(5).multinomial(labels.size, counts / labels.size, size=resamples)
    expected = {name: [] for name in ("matthews_correlation", "accuracy")}
    for row in drawn:
        y, a, b = np.repeat(patterns, row, axis=1)
        assert y.size == labels.size
        for name, values in expected.items():
            values.append(SKLEARN[name](y, a) - SKLEARN[name](y, b))
    got = statistics.paired_bootstrap(
        labels, predictions[0], predictions[1], list(expected), classes, np.random.default_rng(5), resamples
    )
    for name, values in expected.items():
        assert got[name].low == pytest.approx(np.quantile(values, 0.025), abs=1e-12)
        assert got[name].high == pytest.approx(np.quantile(values, 0.975), abs=1e-12)
        difference = SKLEARN[name](labels, predictions[0]) - SKLEARN[name](labels, predictions[1])
        assert got[name].difference == pytest.approx(difference, abs=1e-12)


def test_bootstrap_interval_has_the_width_that_theory_gives():
    rng = np.random.default_rng(3)
    labels = np.zeros(1000, dtype=int)
    first, second = (rng.random(1000) < 0.2).astype(int), (rng.random(1000) < 0.2).astype(int)
    interval = statistics.paired_bootstrap(labels, first, second, ["accuracy"], 2, rng)["accuracy"]
    standard_error = np.std((first == labels).astype(float) - (second == labels)) / math.sqrt(1000)
    assert (interval.high - interval.low) / (2 * 1.96 * standard_error) == pytest.approx(1.0, abs=0.05)


def test_hierarchical_interval_brackets_the_estimate_and_follows_its_generator():
    labels, predictions = example_predictions(11, 8, 200, 2)
    arguments = (labels, predictions[:4], predictions[4:], ["matthews_correlation"], 2)
    one, same, other = (statistics.paired_bootstrap(*arguments, np.random.default_rng(s), 2000) for s in (1, 1, 2))
    interval = one["matthews_correlation"]
    assert interval.low < interval.difference < interval.high
    assert one == same
    assert one != other


def test_hierarchical_interval_counts_both_sources_of_variance():
    # Copies of one pair carry no seed variance and no further examples: their interval is that pair's, not one
    # narrowed by sqrt(S).
    labels, predictions = example_predictions(13, 2, 300, 2)
    rng = np.random.default_rng
    single = statistics.paired_bootstrap(labels, predictions[0], predictions[1], ["accuracy"], 2, rng(0))["accuracy"]
    copies = statistics.paired_bootstrap(
        labels, np.tile(predictions[0], (6, 1)), np.tile(predictions[1], (6, 1)), ["accuracy"], 2, rng(0)
    )["accuracy"]
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.06)
    # Seeds that differ widen it.
    other = predictions[1][::-1].copy()
    mixed = statistics.paired_bootstrap(
        labels, np.vstack([predictions[0], other]), np.vstack([predictions[1], predictions[1]]), ["accuracy"], 2, rng(0)
    )["accuracy"]
    assert mixed.high - mixed.low > 1.5 * (single.high - single.low)


@pytest.mark.parametrize(
    "differences", [[0.3, -0.1, 0.2], [1.0, 2.0, 3.0, 4.0], [0.0, 0.5], [1.0, -1.0, 1.0, 1.0, 2.0]]
)
def test_sign_flip_p_value_equals_enumeration(differences: list[float]):
    observed = abs(sum(differences))
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= observed - 1e-12 for value in flipped) / len(flipped)
    got = statistics.sign_flip_p_value(np.array(differences), np.random.default_rng(0))
    assert got == pytest.approx(expected, abs=1e-12)


def test_seed_tests_of_a_hand_computed_case():
    tests = statistics.compare_seeds(np.array([1.0, 2.0, 3.0]), np.random.default_rng(0))
    assert (tests.count, tests.mean, tests.standard_deviation, tests.wins) == (3, 2.0, 1.0, 3)
    assert tests.t_statistic == pytest.approx(2.0 * math.sqrt(3))
    # Student's t with two degrees of freedom: p = 1 - t / sqrt(2 + t²), here with t² = 12.
    assert tests.t_p_value == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)
    assert tests.sign_flip_p_value == pytest.approx(2 / 8)
    assert tests.sign_flip_smallest_p_value == pytest.approx(2 / 8)


def test_one_seed_allows_no_test():
    tests = statistics.compare_seeds(np.array([0.5]), np.random.default_rng(0))
    assert tests.mean == 0.5
    assert (tests.standard_deviation, tests.t_p_value, tests.sign_flip_p_value) == (None, None, None)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_differences_that_do_not_vary_have_no_t_test(value: float):
    tests = statistics.compare_seeds(np.full(4, value), np.random.default_rng(0))
    assert (tests.t_statistic, tests.t_p_value) == (None, None)
    assert tests.sign_flip_p_value == pytest.approx(1.0 if value == 0 else 2 / 16)


def test_rejection_rate_on_null_data_is_the_level():
    rng = np.random.default_rng(17)
    p_values = [statistics.compare_seeds(rng.normal(size=7), rng) for _ in range(400)]
    for name in ("t_p_value", "sign_flip_p_value"):
        rate = np.mean([getattr(tests, name) <= 0.05 for tests in p_values])
        assert 0.02 < rate < 0.08


def test_holm_of_a_hand_computed_case():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (raised to 0.06 by the step before), 0.5 x 1.
    assert statistics.holm_adjust([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert statistics.holm_adjust([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert statistics.holm_adjust([]) == []


@pytest.mark.parametrize("differences", [[], [0.1, math.nan]])
def test_differences_must_be_finite(differences: list[float]):
    with pytest.raises(ValueError, match="finite"):
        statistics.compare_seeds(np.array(differences), np.random.default_rng(0))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        statistics.mcnemar_exact(np.zeros(3, dtype=int), np.zeros(3, dtype=int), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="same shape"):
        statistics.paired_bootstrap(
            np.zeros(3, dtype=int),
            np.zeros((2, 3), int),
            np.zeros((1, 3), int),
            ["accuracy"],
            2,
            np.random.default_rng(),
        )
