"""Runs that may not decide a claim: too few, unlike, or not of what it speaks of."""

from __future__ import annotations

import pytest

from fwlora.experiment.evaluation.compare.results import Reason
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


def test_one_seed_decides_nothing():
    result = judge(make_runs([200]), above=make_claim())
    assert result.verdict == "undecided"
    assert reason_of(result) == "no seed-level test possible: one paired seed"
    assert result.findings[0].interval_over == "examples" and result.findings[0].test is None


def test_times_of_different_machines_decide_nothing():
    given = with_times({"lora": [100.0, 101.0, 102.0], "proposed": [90.0, 91.0, 92.5]})
    given[0] = records.change(given[0], config__resolved__environment={"device": "H100", "threads": 2})
    result = judge(given, time=make_claim(measure="training_time", at_least=None, at_most=1.01))
    assert result.verdict == "undecided" and "different machines (H100, 2 threads; None, None threads)" in reason_of(
        result
    )


def test_runs_that_differ_in_more_than_the_method_decide_nothing():
    given = [
        run if "lora" in run.run_id else records.change(run, config__run__training__learning_rate=1e-3)
        for run in make_runs([100, 90, 80, 110, 95])
    ]
    result = judge(given, above=make_claim())
    assert result.verdict == "undecided"
    assert "unequal training settings: training.learning_rate is 0.001 for FW-LoRA, 0.0002 for LoRA" in reason_of(
        result
    )


def test_the_control_must_have_the_same_strength():
    lora_free = [make_run("control", s, 3400 + s) for s in range(4)] + [make_run("proposed", s, 3500) for s in range(4)]
    claim = make_claim(contrast={"proposed": 1, "control": -1})
    assert judge(lora_free, control=claim).verdict == "supported"
    weaker = [
        records.change(run, config__run__fw_lora__lambda_fw=1e-3) if "control" in run.run_id else run
        for run in lora_free
    ]
    result = judge(weaker, control=claim)
    assert result.verdict == "undecided" and "the control's fw_lora.lambda_fw is not the method's" in reason_of(result)


def test_missing_methods_are_named():
    result = judge(make_runs([10, 20]), gain=make_claim(contrast={"proposed": 1, "adalora": -1}))
    assert result.verdict == "undecided" and reason_of(result).endswith("no runs of AdaLoRA")
    assert result.findings[0].value is None


def test_variants_are_told_apart_and_the_specifications_own_is_chosen():
    given = make_runs([100, 90, 80, 110])
    other = [records.change(make_run("proposed", s, 3000), config__run__fw_lora__importance="max") for s in range(4)]
    renamed = [records.change(run, run_id=f"max{i}", config__run__run_id=f"max{i}") for i, run in enumerate(other)]
    result = judge(given + renamed, above=make_claim())
    assert result.verdict == "supported" and result.findings[0].value == pytest.approx(100 * 95 / EXAMPLES)
    steeper = [
        records.change(renamed[i], config__run__fw_lora__importance="sum", config__run__fw_lora__lambda_fw=1)
        for i in range(4)
    ]
    result = judge(given + steeper, above=make_claim())
    assert result.verdict == "undecided" and "several variants of FW-LoRA" in reason_of(result)


def test_a_control_of_a_searched_strength_needs_the_same_one_for_each_seed():
    space = {"lambda_fw": {"type": "loguniform", "low": 5e-5, "high": 5e-4}}
    given = []
    for role, strength, right in (("control", 5e-4, 3400), ("proposed", 5e-5, 3500)):
        for seed in range(4):
            search = {"n_trials": 5, "search_space": space}
            paths = {"config__run__optuna": search, "config__run__fw_lora__lambda_fw": strength}
            given.append(records.change(make_run(role, seed, right + 3 * seed), **paths))
    claim = make_claim(contrast={"proposed": 1, "control": -1})
    result = judge(given, control=claim)
    assert result.verdict == "undecided" and "the control's fw_lora.lambda_fw is not the method's" in reason_of(result)
    with_lora = [*given, *(records.change(make_run("lora", s, 3300), config__run__optuna=search) for s in range(4))]
    three = make_claim(contrast={"proposed": 1, "control": -0.5, "lora": -0.5})
    assert "the control's fw_lora.lambda_fw" in reason_of(judge(with_lora, control=three))


@pytest.mark.parametrize(("key", "other"), [("warmup_steps", 7), ("allocation", "reallocate")])
def test_the_control_shrinks_from_the_same_step_within_the_same_ranks(key, other):
    given = [make_run("control", s, 3400 + s, **{f"config__run__fw_lora__{key}": other}) for s in range(4)]
    given += [make_run("proposed", s, 3500 + s) for s in range(4)]
    result = judge(given, control=make_claim(contrast={"proposed": 1, "control": -1}))
    assert result.verdict == "undecided" and f"the control's fw_lora.{key} is not the method's" in reason_of(result)


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        ({"config__engine": {"fast": False}}, "unequal engine (fast)"),
        ({"config__resolved__precision": "fp32"}, "unequal precision: "),
        ({"summary__total_steps": 10}, "unequal steps: "),
        ({"summary__encoder_fingerprint": "x"}, "unequal encoder weights: "),
        ({"config__resolved__train_fingerprint": "x"}, "unequal data (train_fingerprint): "),
        ({"summary__final_eval_accuracy": 0.2}, "records accuracy 0.2000, its predictions give"),
    ],
)
def test_runs_that_were_made_in_another_way_decide_nothing(paths, told):
    given = [run if "lora" in run.run_id else records.change(run, **paths) for run in make_runs([100, 90, 80, 110])]
    result = judge(given, above=make_claim())
    assert result.verdict == "undecided" and told in reason_of(result)


def test_a_further_seed_in_one_budget_changes_nothing():
    values = {0.1: [40, 70, 10, 55, 20], 0.2: [100, 60, 75, 90, 85], 0.5: [15, 30, 25, 60, 35]}
    equal = [run for budget, each in values.items() for run in make_runs(each, budget=budget)]
    further = [make_run(role, 5, right, budget=0.2) for role, right in (("lora", 3400), ("proposed", 3900))]
    (alone,) = judge(equal, above=make_claim()).findings
    (more,) = judge(equal + further, above=make_claim()).findings
    assert more.left_out == (Reason("glue/sst2, roberta-base, 0.2 %", "seeds 5, which its other budgets do not have"),)
    assert (more.value, more.low, more.high, more.p_value) == (alone.value, alone.low, alone.high, alone.p_value)


def test_a_cell_with_one_seed_is_left_out_of_the_pool():
    given = make_runs([100, 90, 80, 110], budget=0.1) + make_runs([-500], subset="rte", budget=0.1)
    (finding,) = (result := judge(given, above=make_claim())).findings
    assert result.verdict == "supported"
    assert finding.left_out == (Reason("glue/rte, roberta-base, 0.1 %", "one paired seed"),)
    assert finding.cells == ("glue/sst2, roberta-base, 0.1 %",)


def test_another_variant_alone_is_not_the_specifications_method():
    given = [
        run if "lora" in run.run_id else records.change(run, config__run__fw_lora__importance="max")
        for run in make_runs([100, 90, 80, 110])
    ]
    result = judge(given, above=make_claim())
    assert result.verdict == "undecided" and 'fw_lora.importance = "max"' in reason_of(result)


def test_a_claim_about_two_tasks_is_not_supported_by_one():
    about = {"model": "roberta-base", "tasks": ["sst2", "rte"]}
    given = make_runs([100, 90, 80, 110])
    result = judge(given, above=make_claim(about=about))
    assert (result.verdict, remedy_of(result)) == ("undecided", "runs on rte")
    assert "it speaks of rte as well" in reason_of(result) and result.findings[0].verdict == "supported"
    both = given + make_runs([100, 95, 85, 105], subset="rte")
    assert judge(both, above=make_claim(about=about, scope="each_cell")).verdict == "supported"
    # Of another model, a verdict is about the runs alone.
    elsewhere = {"model": "roberta-large", "tasks": ["sst2", "rte"]}
    assert judge(given, above=make_claim(about=elsewhere)).verdict == "supported"


def test_a_budget_in_ranks_is_no_budget_in_per_cent():
    given = [records.change(run, config__run__model__budget_mode="rank") for run in make_runs([10, 20])]
    result = judge(given, claim=make_claim(budgets=[8]))
    assert (result.verdict, result.findings) == ("undecided", ())
