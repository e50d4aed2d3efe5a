"""Verdicts on made-up runs whose truth is known: intervals, tests, and what would decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fwlora.experiment.evaluation.claims.verdicts import judge_claims
from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.hypothesis_tests import (
    holm_adjust,
    seeds_needed,
    stratified_mean,
    stratified_sign_flip_p_value,
)
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.tracking.records import RunRecord, pack_classes
from tests.helpers import evaluation_records as records
from tests.helpers.verdict_runs import (
    EXAMPLES,
    judge,
    make_claim,
    make_run,
    make_runs,
    reason_of,
    remedy_of,
    with_times,
)


def with_norms(factors) -> list[RunRecord]:
    """LoRA and FW-LoRA runs of six modules; FW-LoRA's norms are LoRA's times ``factors``, by rank of importance."""
    names = [f"encoder.layer.{i}.query" for i in range(6)]
    importances = [0.3, 0.05, 0.2, 0.1, 0.25, 0.1]
    order = sorted(range(6), key=lambda i: (importances[i], names[i]))
    given = []
    for seed in range(4):
        norms = 1.0 + np.random.default_rng(seed).random(6)
        scaled = norms * 1.001**seed
        for place, module in enumerate(order):
            scaled[module] *= factors[place]
        for role, values, measured in (("lora", norms, [None] * 6), ("proposed", scaled, importances)):
            paths = {
                "summary__module_names": names,
                "summary__module_delta_norms": values.tolist(),
                "summary__module_importances": measured,
            }
            given.append(make_run(role, seed, 3400, **paths))
    return given


def test_a_clear_difference_is_supported_with_its_interval_and_test():
    differences = [80, 100, 90, 110, 95]
    result = judge(make_runs(differences), above=make_claim())
    (finding,) = result.findings
    points = np.array(differences) / EXAMPLES * 100
    assert (result.verdict, reason_of(result), remedy_of(result)) == ("supported", None, None)
    assert finding.value == pytest.approx(points.mean())
    assert (finding.test, finding.seeds) == ("paired t", (5,))
    assert finding.p_value == finding.p_value_holm == pytest.approx(stats.ttest_1samp(points, 0).pvalue)
    assert 0 < finding.low < finding.value < finding.high


def test_a_clear_difference_the_other_way_is_refuted():
    result = judge(make_runs([-80, -100, -90, -110, -95]), above=make_claim())
    assert (result.verdict, reason_of(result), remedy_of(result)) == ("refuted", None, None)


def test_the_bound_is_what_is_tested():
    differences = [-4, -2, -6, -3, -5]  # -0.1 points
    given = make_runs(differences)
    result = judge(given, within=make_claim(at_least=-1.0))
    points = np.array(differences) / EXAMPLES * 100
    assert result.verdict == "supported"
    assert result.findings[0].p_value == pytest.approx(stats.ttest_1samp(points, -1.0).pvalue)
    assert judge(given, above=make_claim(at_least=0.0)).verdict == "refuted"
    assert judge(given, above=make_claim(at_least=None, at_most=0.0)).verdict == "supported"


def test_seeds_that_disagree_leave_it_undecided_and_say_how_many_would_do():
    differences = [300, -280, 290, -250, 200]
    result = judge(make_runs(differences), above=make_claim())
    assert result.verdict == "undecided" and "interval reaches across the bound" in reason_of(result)
    values = np.array(differences) / EXAMPLES
    allowed = abs(values.mean()) / (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    needed = int(remedy_of(result).split("about ")[1].split(" ")[0])
    examples = np.arange(EXAMPLES)
    rights = [(3400 + 7 * seed, 3400 + 7 * seed + difference) for seed, difference in enumerate(differences)]
    by_example = np.mean([(examples < ours) * 1.0 - (examples < theirs) for theirs, ours in rights], axis=0)
    expected = values.var(ddof=1) / (allowed**2 - by_example.var() / EXAMPLES)
    assert expected > seeds_needed(values.mean(), values.std(ddof=1)), "examples ask for more seeds"
    assert needed == pytest.approx(expected, rel=0.1)
    assert remedy_of(result).endswith("if the value is what it seems (power 80 %, one claim alone)")


def test_examples_that_cannot_tell_are_named_instead_of_seeds():
    # 3 of 4,000 examples in every seed, but 200 examples change sides each way.
    labels = records.make_labels(EXAMPLES)
    given = []
    for seed in range(5):
        for role, block in (("lora", slice(0, 200)), ("proposed", slice(200, 397 + seed % 2))):
            wrong = np.zeros(EXAMPLES, dtype=bool)
            wrong[block] = True
            predictions = np.where(wrong, 1 - labels, labels)
            paths = {
                "summary__eval_predictions": pack_classes(predictions, 2),
                "summary__final_eval_accuracy": float(np.mean(predictions == labels)),
            }
            given.append(make_run(role, seed, 3000, **paths))
    result = judge(given, above=make_claim())
    assert result.verdict == "undecided", "the seeds agree, but other examples might not"
    assert result.findings[0].p_value_holm < 0.05
    assert "evaluation examples: seeds alone cannot" in remedy_of(result)
    # Difference about 0.065 points, its standard error over examples sqrt(400)/4000 = 0.5 points.
    needed = int(remedy_of(result).split("more than ")[1].split(" ")[0].replace(",", ""))
    assert needed == pytest.approx(4000 * (2.8016 * 0.5 / 0.065) ** 2, rel=0.15)


def test_pooled_over_cells_uses_stratified_flips():
    differences = {0.1: [40, 70, 10, 55, 20], 0.2: [100, 60, 75, 90, 85], 0.5: [15, 30, 25, 60, 35]}
    cells = [(subset, budget, values) for subset in ("rte", "sst2") for budget, values in differences.items()]
    given = [run for subset, budget, values in cells for run in make_runs(values, budget=budget, subset=subset)]
    result = judge(given, above=make_claim())
    (finding,) = result.findings
    strata = [np.array(values) / EXAMPLES for _, _, values in cells]
    blocks = [[(subset, seed) for seed in range(5)] for subset, _, _ in cells]
    flips = [
        stratified_sign_flip_p_value(strata, np.random.default_rng(0), side, blocks=blocks)
        for side in ("greater", "less")
    ]
    merged = [np.mean(strata[:3], axis=0), np.mean(strata[3:], axis=0)]
    assert (finding.test, finding.seeds, len(finding.cells)) == ("stratified sign flips and t", (5,) * 6, 6)
    assert min(flips) == 1 / 2**10 > stratified_mean(merged).p_value(0.0, "greater")
    assert finding.p_value == pytest.approx(2 * min(flips))
    assert finding.value == pytest.approx(100 * np.mean([values.mean() for values in strata]))
    assert result.verdict == "supported"


def test_budgets_of_one_data_set_are_one_observation_for_each_seed():
    differences = {0.1: [40, 70, 10, 55, 20], 0.2: [100, 60, 75, 90, 85]}
    given = [run for budget, values in differences.items() for run in make_runs(values, budget=budget)]
    (finding,) = judge(given, above=make_claim()).findings
    means = np.mean(list(differences.values()), axis=0) / EXAMPLES
    assert (finding.test, finding.seeds) == ("paired t", (5, 5))
    assert finding.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert finding.value == pytest.approx(100 * means.mean())
    # A second copy of a budget says nothing new; its interval stays as wide.
    alone = judge(make_runs(differences[0.1], budget=0.1), above=make_claim()).findings[0]
    copied = [run for budget in (0.1, 0.2) for run in make_runs(differences[0.1], budget=budget)]
    (twice,) = judge(copied, above=make_claim()).findings
    assert (twice.value, twice.low, twice.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert twice.p_value == pytest.approx(alone.p_value)


def test_each_cell_has_to_hold():
    good, bad = [100, 90, 80, 110, 95], [-100, -90, -80, -110, -95]
    mixed = make_runs(good, budget=0.1) + make_runs(bad, budget=0.5)
    result = judge(mixed, each=make_claim(scope="each_cell"))
    assert [finding.verdict for finding in result.findings] == ["supported", "refuted"]
    assert result.verdict == "refuted"
    half_open = make_runs(good, budget=0.1) + make_runs([100, -90, 10, -20, 5], budget=0.5)
    result = judge(half_open, each=make_claim(scope="each_cell"))
    assert result.verdict == "undecided" and reason_of(result).startswith(
        "glue/sst2, roberta-base, 0.5 %: the interval"
    )
    only = judge(mixed, one=make_claim(scope="each_cell", budgets=[0.1]))
    assert only.verdict == "supported"
    none = judge(mixed, none=make_claim(budgets=[0.2]))
    assert (none.verdict, reason_of(none)) == ("undecided", "no runs at a budget of 0.2 %")


def test_holm_runs_over_all_claims():
    given = make_runs([30, 60, 20, 80, 50])
    alone = judge(given, a=make_claim()).findings[0]
    together = judge(given, a=make_claim(), b=make_claim(at_least=-0.5), c=make_claim(at_least=0.2))
    raw = [together[name].findings[0].p_value for name in "abc"]
    assert raw[0] == alone.p_value
    assert [together[name].findings[0].p_value_holm for name in "abc"] == holm_adjust(raw)


def test_times_are_compared_as_ratios():
    times = {"lora": [100.0, 102.0, 98.0, 101.0], "proposed": [100.4, 102.7, 98.4, 101.6]}
    given = with_times(times)
    claim = make_claim(measure="training_time", at_least=None, at_most=1.01)
    (finding,) = (result := judge(given, time=claim)).findings
    logs = np.log(np.array(times["proposed"]) / np.array(times["lora"]))
    assert result.verdict == "supported"
    assert finding.value == pytest.approx(math.exp(logs.mean()))
    assert finding.p_value == pytest.approx(stats.ttest_1samp(logs, math.log(1.01)).pvalue)
    assert (finding.low, finding.high) == pytest.approx(
        tuple(np.exp(stats.ttest_1samp(logs, 0).confidence_interval(0.95)))
    )
    assert judge(given, time=make_claim(measure="training_time", at_least=None, at_most=1.001)).verdict == "refuted"


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.87, "supported"), (0.95, "refuted"), (0.80, "refuted"), (0.9, "undecided")]
)
def test_a_claim_with_two_bounds(ratio: float, verdict: str):
    spread = np.array([-0.002, 0.001, 0.003, -0.002])
    given = with_times({"lora": [100.0] * 4, "proposed": (100 * (ratio + spread)).tolist()})
    claim = make_claim(measure="training_time", at_least=0.85, at_most=0.90)
    assert judge(given, time=claim).verdict == verdict


def test_a_share_of_a_gain_is_a_contrast_of_three():
    lora, adalora, proposed = (3400, 3500, 3490)
    given = [
        make_run(role, seed, right + 3 * seed + (seed % 2 if role == "proposed" else 0))
        for role, right in (("lora", lora), ("adalora", adalora), ("proposed", proposed))
        for seed in range(4)
    ]
    contrast = {"proposed": 1, "adalora": -0.8, "lora": -0.2}
    results = judge(
        given,
        gain=make_claim(contrast={"adalora": 1, "lora": -1}),
        share=make_claim(contrast=contrast, requires="gain"),
    )
    # 90 - 0.8 · 100 examples, and half an example on average.
    assert results["share"].findings[0].value == pytest.approx(100 * 10.5 / EXAMPLES)


@pytest.mark.parametrize(
    ("gains", "verdict"), [([-80, -100, -90, -110], "refuted"), ([200, -190, 150, -180], "undecided")]
)
def test_a_claim_without_its_premise_is_not_supported(gains, verdict):
    given = make_runs(gains, role="adalora") + [make_run("proposed", s, 3700 + 7 * s) for s in range(4)]
    results = judge(
        given,
        premise=make_claim(contrast={"adalora": 1, "lora": -1}),
        claim=make_claim(
            contrast={"proposed": 1, "adalora": -0.5, "lora": -0.5}, requires="premise", without_premise="no gain"
        ),
    )
    assert results["premise"].verdict == verdict
    assert f"which is {verdict}" in reason_of(results["claim"])
    if verdict == "refuted":
        # A gain that is a loss cannot be kept: no verdict, and no value that would look like one.
        assert (results["claim"].verdict, results["claim"].findings) == ("does not apply", ())
        assert reason_of(results["claim"]) == "no gain: it rests on “s”, which is refuted"
    else:
        assert results["claim"].verdict == "undecided"


def test_norms_are_compared_within_each_half_of_the_modules():
    given = with_norms([0.5, 0.6, 0.7, 0.99, 1.0, 1.0])
    results = judge(
        given,
        low=make_claim(measure="update_norm", modules="least_important", at_least=None, at_most=1.0),
        high=make_claim(measure="update_norm", modules="most_important", at_least=0.95),
    )
    drift = 1.001**1.5
    assert results["low"].findings[0].value == pytest.approx((0.5 * 0.6 * 0.7) ** (1 / 3) * drift)
    assert results["high"].findings[0].value == pytest.approx(0.99 ** (1 / 3) * drift)
    assert (results["low"].verdict, results["high"].verdict) == ("supported", "supported")


def test_norms_that_were_not_recorded_are_named():
    claim = make_claim(measure="update_norm", modules="least_important", at_least=None, at_most=1.0)
    result = judge(make_runs([10, 20]), low=claim)
    assert "run proposed-sst2-0.2-0 recorded no importances" in reason_of(result)
    given = [records.change(run, summary__module_delta_norms=[0.0] * 6) for run in with_norms([1.0] * 6)]
    assert "no module of seed 0 was updated by all methods" in reason_of(judge(given, low=claim))


def test_equal_scores_leave_no_rounding_error_to_test():
    roles = ("lora", "adalora", "proposed")
    given = [make_run(r, s, 3400 + 13 * s, subset=task) for task in ("sst2", "rte") for s in range(5) for r in roles]
    result = judge(given, share=make_claim(contrast={"proposed": 1, "adalora": -0.8, "lora": -0.2}))
    assert (result.verdict, result.findings[0].value) == ("undecided", 0.0)
    assert reason_of(result) == "no test is possible: the differences are the same for all seeds"


def test_the_test_has_to_point_where_the_mean_does():
    # Many small losses and one large gain: the mean is positive, the signs say the opposite.
    noise = [0, 4, -4, 6, -6, 2, -2, 1]
    given = [run for b in (0.1, 0.2, 0.3, 0.4, 0.5) for run in make_runs([-20 + n for n in noise], budget=b)]
    given += make_runs([430 + n for n in noise], subset="rte", budget=0.2)
    result = judge(given, above=make_claim())
    (finding,) = result.findings
    assert finding.value > 0 and finding.low > 0
    assert result.verdict == "undecided" and finding.p_value > 0.5


def test_a_refuted_claim_stays_refuted_while_its_premise_is_open():
    given = make_runs([200, -190, 150, -180], role="adalora") + [
        make_run("proposed", s, 3000 + 9 * s) for s in range(4)
    ]
    results = judge(
        given,
        premise=make_claim(contrast={"adalora": 1, "lora": -1}),
        claim=make_claim(contrast={"proposed": 1, "lora": -1}, requires="premise"),
    )
    assert (results["premise"].verdict, results["claim"].verdict) == ("undecided", "refuted")
    undecided = judge(
        given,
        premise=make_claim(contrast={"adalora": 1, "lora": -1}),
        claim=make_claim(contrast={"adalora": 1, "lora": -1}, requires="premise"),
    )
    assert reason_of(undecided["claim"]).endswith("which is undecided")


def test_every_cell_counts_alike_however_many_its_data_set_has():
    small, large = [10, 30, 20, 40], [200, 220, 210, 190]
    given = [run for budget in (0.1, 0.2) for run in make_runs(small, budget=budget)]
    given += make_runs(large, subset="rte", budget=0.1)
    (finding,) = judge(given, above=make_claim()).findings
    assert finding.value == pytest.approx(100 * (2 * np.mean(small) + np.mean(large)) / 3 / EXAMPLES)
    # s² / n of the two data sets with weights 2/3 and 1/3; Satterthwaite's degrees of freedom.
    parts = [(2 / 3) ** 2 * np.var(small, ddof=1) / 4, (1 / 3) ** 2 * np.var(large, ddof=1) / 4]
    freedom = sum(parts) ** 2 / sum(part**2 / 3 for part in parts)
    t_value = (2 * np.mean(small) + np.mean(large)) / 3 / math.sqrt(sum(parts))
    flips = 2 / 2**8
    assert finding.p_value == pytest.approx(max(flips, 2 * stats.t.sf(t_value, freedom)))


def test_ratios_over_two_data_sets_have_a_t_test():
    times = {"sst2": [1.02, 1.05, 1.03, 1.06], "rte": [1.01, 1.00, 1.04, 1.02]}
    given = [
        make_run(role, seed, 3400, subset=task, summary__training_time_s=100.0 * (ratio if role == "proposed" else 1))
        for task, ratios in times.items()
        for seed, ratio in enumerate(ratios)
        for role in ("lora", "proposed")
    ]
    (finding,) = judge(given, time=make_claim(measure="training_time", at_least=None, at_most=1.1)).findings
    logs = [np.log(ratios) for ratios in times.values()]
    variances = [log.var(ddof=1) / 4 / 4 for log in logs]
    freedom = sum(variances) ** 2 / sum(v**2 / 3 for v in variances)
    t_value = (np.mean(logs) - math.log(1.1)) / math.sqrt(sum(variances))
    assert finding.test == "stratified paired t"
    assert finding.p_value == pytest.approx(2 * stats.t.cdf(t_value, freedom))


def test_a_clear_interval_is_not_enough_where_holm_asks_for_more():
    given = make_runs([100, 130, 90, 110])
    alone = judge(given, a=make_claim())
    assert alone.findings[0].low > 0 and alone.findings[0].p_value > 0.05 / 200
    many = judge(given, **{f"c{i}": make_claim(at_least=-0.001 * i) for i in range(200)})
    assert {result.verdict for result in many.values()} == {"undecided"}
    assert all(result.findings[0].low > 0 for result in many.values())
    assert reason_of(many["c0"]) == "the test does not reject the bound"


def test_a_decision_says_that_it_rests_on_runs_that_learned():
    decided = judge(make_runs([100, 130, 90, 110]), a=make_claim())
    # 1 - 0.05^(1/4): a failure in more than 53 % of runs would have been seen.
    assert decided.verdict == "supported" and decided.findings[0].caveat == (
        "it rests on runs of which all learned; of 4 runs of a method, up to 53% could fail unseen"
    )
    times = with_times({"lora": [100.0, 101.0, 99.0], "proposed": [80.0, 80.5, 79.5]})
    faster = judge(times, a=make_claim(measure="training_time", at_least=None, at_most=1.0))
    assert faster.verdict == "supported" and faster.findings[0].caveat is None


def test_a_decision_names_the_collapsed_runs_that_it_counts():
    given = make_runs([-1700, -1690, -1710, -1705], base=3400)
    decided = judge(given, a=make_claim())
    assert decided.verdict == "refuted"
    assert "counts 4 runs that did not learn: proposed-sst2-0.2-0, proposed-" in decided.findings[0].caveat


def test_what_would_decide_a_claim_between_two_bounds_is_counted_from_the_nearer_one():
    logs = np.array([-0.02, 0.03, -0.01, 0.02, -0.015])
    logs += math.log(0.89) - logs.mean()
    given = with_times({"lora": [100.0] * 5, "proposed": (100 * np.exp(logs)).tolist()})
    result = judge(given, time=make_claim(measure="training_time", at_least=0.7, at_most=0.90))
    distance, deviation = math.log(0.90 / 0.89), float(logs.std(ddof=1))
    allowed = distance / (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    by_interval = math.ceil(deviation**2 / allowed**2)
    needed = max(seeds_needed(distance, deviation), by_interval)
    assert remedy_of(result).startswith(f"about {needed} seeds, if")


def test_claims_and_statistics_give_one_interval_for_one_contrast():
    given = [run for budget in (0.1, 0.2) for run in make_runs([40, 70, 10, 55, 20], budget=budget)]
    runs = read_runs(given)
    cells, resampled = group_cells(runs), resample_runs(runs, 0, 500)
    (finding,) = judge_claims({"above": make_claim()}, cells, resampled, 0)[0].findings
    (entry,) = compare_pairs(cells, resampled, 0).pooled
    assert (finding.value, finding.low, finding.high) == pytest.approx(
        (100 * entry.mean, 100 * entry.low, 100 * entry.high)
    )
