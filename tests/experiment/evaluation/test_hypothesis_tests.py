"""Tests, effect sizes and power against hand-computed cases, enumeration and textbook formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fwlora.experiment.evaluation.compare import hypothesis_tests
from fwlora.experiment.tracking.task_metrics import score_confusion


def test_mcnemar_of_a_hand_computed_case():
    labels = np.zeros(10, dtype=int)
    first = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 1])
    second = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 1])
    result = hypothesis_tests.mcnemar_exact(labels, first, second)
    assert (result.only_first_correct, result.only_second_correct) == (5, 1)
    # Six coin tosses, five or more alike on either side: 2 (C(6,5) + C(6,6)) / 2^6 = 14/64.
    assert result.p_value == pytest.approx(14 / 64, abs=1e-12)


def test_mcnemar_without_disagreement_is_one():
    labels = np.array([0, 1, 1])
    assert hypothesis_tests.mcnemar_exact(labels, labels, labels).p_value == 1.0


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
    got = hypothesis_tests.sign_flip_p_value(np.array(differences), np.random.default_rng(0))
    assert got == pytest.approx(expected, abs=1e-12)


def test_seed_tests_of_a_hand_computed_case():
    tests = hypothesis_tests.compare_seeds(np.array([1.0, 2.0, 3.0]), np.random.default_rng(0))
    assert (tests.count, tests.mean, tests.standard_deviation, tests.wins) == (3, 2.0, 1.0, 3)
    assert tests.t_statistic == pytest.approx(2.0 * math.sqrt(3))
    # Student's t with two degrees of freedom: p = 1 - t / sqrt(2 + t²), here with t² = 12.
    assert tests.t_p_value == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)
    assert tests.sign_flip_p_value == pytest.approx(2 / 8)
    assert tests.sign_flip_smallest_p_value == pytest.approx(2 / 8)


def test_one_seed_allows_no_test():
    tests = hypothesis_tests.compare_seeds(np.array([0.5]), np.random.default_rng(0))
    assert tests.mean == 0.5
    assert (tests.standard_deviation, tests.t_p_value, tests.sign_flip_p_value) == (None, None, None)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_differences_that_do_not_vary_have_no_t_test(value: float):
    tests = hypothesis_tests.compare_seeds(np.full(4, value), np.random.default_rng(0))
    assert (tests.t_statistic, tests.t_p_value) == (None, None)
    assert tests.sign_flip_p_value == pytest.approx(1.0 if value == 0 else 2 / 16)


def test_rejection_rate_on_null_data_is_the_level():
    rng = np.random.default_rng(17)
    p_values = [hypothesis_tests.compare_seeds(rng.normal(size=7), rng) for _ in range(400)]
    for name in ("t_p_value", "sign_flip_p_value"):
        rate = np.mean([getattr(tests, name) <= 0.05 for tests in p_values])
        assert 0.02 < rate < 0.08


def test_holm_of_a_hand_computed_case():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (raised to 0.06 by the step before), 0.5 x 1.
    assert hypothesis_tests.holm_adjust([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert hypothesis_tests.holm_adjust([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert hypothesis_tests.holm_adjust([]) == []
    assert hypothesis_tests.holm_adjust([None, 0.02, None, 0.03]) == [
        None,
        pytest.approx(0.04),
        None,
        pytest.approx(0.04),
    ]


@pytest.mark.parametrize("differences", [[], [0.1, math.nan]])
def test_differences_must_be_finite(differences: list[float]):
    with pytest.raises(ValueError, match="finite"):
        hypothesis_tests.compare_seeds(np.array(differences), np.random.default_rng(0))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        hypothesis_tests.mcnemar_exact(np.zeros(3, dtype=int), np.zeros(3, dtype=int), np.zeros(4, dtype=int))


def test_effect_size_and_power_of_a_hand_computed_case():
    tests = hypothesis_tests.compare_seeds(np.array([1.0, 2.0, 3.0]), np.random.default_rng(0))
    # d = 2 / 1, Hedges' factor 1 - 3 / (4 · 2 - 1) = 4/7.
    assert tests.hedges_g == pytest.approx(2 * 4 / 7)
    assert hypothesis_tests.compare_seeds(np.array([1.0, 2.0]), np.random.default_rng(0)).hedges_g is None
    assert tests.minimum_detectable_difference is not None


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30])
def test_minimum_detectable_difference_is_found_in_four_studies_of_five(seeds: int):
    difference = hypothesis_tests.minimum_detectable_difference(1.7, seeds)
    rng = np.random.default_rng(seeds)
    p_values = stats.ttest_1samp(rng.normal(difference, 1.7, size=(40_000, seeds)), 0.0, axis=1).pvalue
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("distance", "deviation", "strata"), [(1.0, 1.0, 1), (0.5, 1.0, 1), (0.4, 0.5, 6), (-2.0, 3.0, 2)]
)
def test_seeds_needed_are_enough_and_one_less_is_not(distance: float, deviation: float, strata: int):
    needed = hypothesis_tests.seeds_needed(distance, deviation, strata)
    assert needed is not None
    rng = np.random.default_rng(3)

    def found(seeds: int) -> float:
        # Strata of equal spread: the deviation of their mean is sqrt(C) s / C.
        values = rng.normal(distance, deviation * math.sqrt(strata), size=(8_000, strata, seeds))
        error = np.sqrt((values.var(axis=2, ddof=1) / seeds).sum(axis=1)) / strata
        statistic = values.mean(axis=(1, 2)) / error
        return float(np.mean(2 * stats.t.sf(np.abs(statistic), strata * (seeds - 1)) < 0.05))

    assert found(needed) > 0.785
    assert needed == 2 or found(needed - 1) < 0.8


def test_seeds_needed_at_the_edges():
    assert hypothesis_tests.seeds_needed(0.0, 1.0) is None
    assert hypothesis_tests.seeds_needed(1.0, 0.0) == 2
    assert hypothesis_tests.seeds_needed(50.0, 1.0) == 2
    assert hypothesis_tests.seeds_needed(0.01, 1.0) is None


def test_stratified_mean_with_one_stratum_is_students_t():
    values = np.array([0.3, -0.1, 0.4, 0.2])
    found = hypothesis_tests.stratified_mean([values])
    expected = stats.ttest_1samp(values, 0.1)
    assert found.interval(0.95) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_value(0.1, "greater") == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="greater").pvalue)
    assert found.p_value(0.1, "less") == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)


def test_stratified_mean_of_two_strata_has_welchs_degrees_of_freedom():
    rng = np.random.default_rng(1)
    first, second = rng.normal(1.0, 1.0, 5), rng.normal(3.0, 4.0, 8)
    found = hypothesis_tests.stratified_mean([first, -second])
    welch = stats.ttest_ind(first, second, equal_var=False)
    assert found.degrees_of_freedom == pytest.approx(welch.df)
    assert 2 * found.p_value(0.0, "less") == pytest.approx(welch.pvalue)
    assert found.estimate == pytest.approx((first.mean() - second.mean()) / 2)


def test_strata_without_spread_or_with_one_value():
    assert hypothesis_tests.stratified_mean([np.array([1.0, 1.0]), np.array([3.0, 3.0])]).interval(0.95) == (2.0, 2.0)
    assert hypothesis_tests.stratified_mean([np.array([1.0, 1.0])]).p_value(0.0, "greater") is None
    alone = hypothesis_tests.stratified_mean([np.array([1.0, 2.0]), np.array([3.0])])
    assert (alone.estimate, alone.interval(0.95), alone.p_value(0.0, "less")) == (2.25, None, None)


def test_stratified_flips_of_a_hand_computed_case():
    # Cells scaled to mean(d) / rms(d): (1, 1) and (3, 1) / sqrt(5), each term halved by its cell's two seeds.
    strata = [np.array([0.2, 0.2]), np.array([30.0, 10.0])]
    terms = [0.5, 0.5, 1.5 / math.sqrt(5), 0.5 / math.sqrt(5)]
    sums = [
        sum(s * term for s, term in zip(signs, terms, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    rng = np.random.default_rng(0)
    for alternative, expected in (
        ("greater", np.mean([value >= sums[0] - 1e-12 for value in sums])),
        ("less", np.mean([value <= sums[0] + 1e-12 for value in sums])),
        ("two-sided", 2 * np.mean([value >= sums[0] - 1e-12 for value in sums])),
    ):
        got = hypothesis_tests.stratified_sign_flip_p_value(strata, rng, alternative)
        assert got == pytest.approx(min(1.0, expected), abs=1e-12)


def test_cells_count_alike_however_many_seeds_they_have():
    strata = [np.array([0.5, 0.3]), np.array([-0.1, 0.4, 0.2, -0.3, 0.1, 0.2])]
    terms = np.concatenate([values / (values.size * math.sqrt(np.mean(values**2))) for values in strata])
    sums = [np.dot(signs, terms) for signs in itertools.product((1, -1), repeat=8)]
    got = hypothesis_tests.stratified_sign_flip_p_value(strata, np.random.default_rng(0), "greater")
    assert got == pytest.approx(np.mean(np.array(sums) >= sums[0] - 1e-12))


def test_rounding_errors_are_no_differences():
    values = 0.1 + np.array([1e-17, -1e-17, 0.0, 2e-17])
    assert hypothesis_tests.compare_seeds(values, np.random.default_rng(0)).t_p_value is None
    assert hypothesis_tests.stratified_sign_flip_p_value([np.full(5, 1e-17)], np.random.default_rng(0)) == 1.0


def test_differences_of_one_block_flip_together():
    strata = [np.array([0.2, 0.1, -0.1]), np.array([30.0, 10.0, 5.0])]
    terms = [values / (3 * math.sqrt(np.mean(values**2))) for values in strata]
    by_seed = terms[0] + terms[1]
    sums = [np.dot(signs, by_seed) for signs in itertools.product((1, -1), repeat=3)]
    rng = np.random.default_rng(0)
    got = hypothesis_tests.stratified_sign_flip_p_value(strata, rng, blocks=[(1, 2, 3), (1, 2, 3)])
    assert got == pytest.approx(np.mean(np.abs(sums) >= abs(sums[0]) - 1e-12))
    # Copies of one cell tell nothing new, which flips one by one do not know.
    values = np.array([0.2, 0.3, 0.1, 0.25, -0.02])
    alone = hypothesis_tests.stratified_sign_flip_p_value([values], rng)
    assert hypothesis_tests.stratified_sign_flip_p_value([values] * 3, rng, blocks=[range(5)] * 3) == pytest.approx(
        alone
    )
    assert hypothesis_tests.stratified_sign_flip_p_value([values] * 3, rng) < 0.2 * alone


def test_stratified_flips_do_not_depend_on_the_scale_of_a_cell():
    strata = [np.array([0.1, -0.2, 0.3]), np.array([5.0, 7.0, -1.0])]
    p_values = [
        hypothesis_tests.stratified_sign_flip_p_value([strata[0] * scale, strata[1]], np.random.default_rng(0))
        for scale in (1.0, 1e-3, 1e3)
    ]
    assert p_values[0] == p_values[1] == p_values[2]
    with_zeros = hypothesis_tests.stratified_sign_flip_p_value([np.zeros(3)], np.random.default_rng(0))
    assert with_zeros == 1.0


def test_sampled_flips_agree_with_all_of_them():
    strata = [np.random.default_rng(2).normal(0.4, 1.0, 7) for _ in range(2)]
    rng = np.random.default_rng(0)
    exact = hypothesis_tests.stratified_sign_flip_p_value(strata, rng)
    with_seventeenth = [*strata, np.zeros(3)]
    assert hypothesis_tests.stratified_sign_flip_p_value(with_seventeenth, rng) == pytest.approx(exact, abs=0.01)


def simulate_null_study(rng: np.random.Generator, shared: float) -> list[np.ndarray]:
    """Differences of two methods that do not differ: 2 tasks x 3 budgets x 5 seeds, from predictions to metrics.

    Examples differ in difficulty, alike for both methods; seeds in how good the run is, and on CoLA's scale sometimes
    by much; ``shared`` is the part of that variance which a seed brings to all budgets, as data order and head do.
    Accuracy for the first task, Matthews correlation for the second.
    """
    strata = []
    for metric, count, right, spread in (("accuracy", 872, 0.93, 0.004), ("matthews_correlation", 1043, 0.8, 0.02)):
        labels = (rng.random(count) < 0.6).astype(int)
        difficulty = rng.beta(8 * right, 8 * (1 - right), size=count)
        of_seed = rng.normal(0.0, spread, size=(5, 2, 1))
        for _ in range(3):
            own = rng.normal(0.0, spread, size=(5, 2, 1))
            quality = difficulty + math.sqrt(shared) * of_seed + math.sqrt(1 - shared) * own
            predictions = np.where(rng.random((5, 2, count)) < quality, labels, 1 - labels)
            cells = 2 * labels + predictions
            confusions = np.stack([(cells == cell).sum(axis=2) for cell in range(4)], axis=-1).reshape(5, 2, 2, 2)
            scores = score_confusion(metric, confusions)
            strata.append(scores[:, 0] - scores[:, 1])
    return strata


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_headline_test_rejects_one_null_study_in_twenty(shared: float):
    rng = np.random.default_rng(20_261_123)
    blocks = [[(task, seed) for seed in range(5)] for task in range(2) for _ in range(3)]
    p_values = [
        hypothesis_tests.stratified_sign_flip_p_value(simulate_null_study(rng, shared), rng, blocks=blocks)
        for _ in range(1000)
    ]
    rate = float(np.mean(np.array(p_values) <= 0.05))
    print(f"false-positive rate of the headline test, {shared:.0%} of the seeds' variance shared: {rate:.3f}")
    assert 0.03 < rate < 0.07
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
