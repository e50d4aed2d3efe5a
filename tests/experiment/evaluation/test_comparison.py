"""Reading, grouping, aggregating and comparing made-up records."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import PairChoice, group_cells
from fwlora.experiment.evaluation.compare.comparability import find_warnings
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.hypothesis_tests import holm_adjust, mcnemar_exact
from fwlora.experiment.evaluation.compare.references import ConstantReference, has_learned, score_constant
from fwlora.experiment.evaluation.compare.results import ComparisonWarning
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.compare.settings import flatten_settings
from fwlora.experiment.evaluation.output import documents, tables
from fwlora.experiment.evaluation.output.aggregate import aggregate
from fwlora.experiment.evaluation.output.documents import describe_cells, describe_comparison
from fwlora.experiment.tracking.records import pack_classes
from tests.helpers import evaluation_records as records

make_record, change = records.make_record, records.change


BEST = ("best_proposed", "best_baseline", "gap", "improvement_rate")


def cells_of(*given):
    return group_cells(read_runs(given))


def compare(cells, rng_seed: int = 0, resamples: int = 200):
    runs = [run for cell in cells for run in cell.runs]
    return compare_pairs(cells, resample_runs(runs, rng_seed, resamples), rng_seed)


def warn(cells):
    return find_warnings(cells, resample_runs([run for cell in cells for run in cell.runs], 0, 200))


def with_accuracy(record, value: float):
    return change(record, summary__final_eval_accuracy=value)


def three_seeds():
    methods = {"x": "baseline_lora", "y": "adalora", "z": "proposed_fw_lora"}
    return [make_record(f"{name}{seed}", method, seed) for seed in (1, 2, 3) for name, method in methods.items()]


def test_runs_are_grouped_by_settings_not_by_names():
    # Names that would mislead a parser of names.
    cell = cells_of(
        make_record("proposed-a", "baseline_lora", 1),
        make_record("baseline-b", "proposed_fw_lora", 1),
        make_record("comparative-c", "proposed_fw_lora", 2),
    )[0]
    assert [(group.label, [run.run_id for run in group.runs]) for group in cell.groups] == [
        ("LoRA", ["proposed-a"]),
        ("FW-LoRA", ["baseline-b", "comparative-c"]),
    ]


def test_variants_are_labelled_by_the_keys_that_differ():
    uniform = change(make_record("u", "proposed_fw_lora"), config__run__fw_lora__importance="none")
    unset = change(make_record("v", "proposed_fw_lora"), config__run__fw_lora__importance=None)
    cell = cells_of(make_record("a"), make_record("p", "proposed_fw_lora"), uniform, unset)[0]
    assert [group.label for group in cell.groups] == [
        "LoRA",
        "uniform shrinkage",
        "FW-LoRA (fw_lora.importance=sum)",
        "FW-LoRA (fw_lora.importance=unset)",
    ]
    assert [group.role for group in cell.groups] == ["lora", "control", "proposed", "proposed"]
    pairs = [(first.runs[0].run_id, second.runs[0].run_id) for first, second in cell.pairs(PairChoice())]
    assert sorted(pairs) == [("p", "a"), ("p", "u"), ("u", "a"), ("v", "a"), ("v", "u")]

    def choose(**choice) -> list[tuple[str, str]]:
        chosen = cell.pairs(PairChoice(**choice))
        return sorted((first.runs[0].run_id, second.runs[0].run_id) for first, second in chosen)

    assert choose(reference="control") == [("a", "u"), ("p", "a"), ("p", "u"), ("v", "a"), ("v", "u")]
    assert choose(every=True) == sorted([*pairs, ("v", "p")])
    assert choose(reference="adalora") == [("p", "a"), ("p", "u"), ("v", "a"), ("v", "u")]


def test_an_integral_float_is_the_same_setting():
    node = {"a": 2.0, "b": [1.0, 2.5], "c": None, "optuna": {"search_space": {"x": {"low": 1.0}}}}
    assert flatten_settings(node) == flatten_settings(
        {"a": 2, "b": [1, 2.5], "optuna": {"search_space": {"x": {"low": 1}}}}
    )


def test_what_a_search_found_is_no_setting():
    space = {"learning_rate": {"type": "loguniform", "low": 1e-4, "high": 3e-4}}
    searched = [
        change(
            make_record(f"a{seed}", seed=seed),
            config__run__optuna={"n_trials": 20, "search_space": space},
            config__run__training__learning_rate=rate,
        )
        for seed, rate in ((1, 1.1e-4), (2, 2.7e-4))
    ]
    assert len(cells_of(*searched)[0].groups) == 1
    unsearched = [change(record, config__run__optuna__n_trials=0) for record in searched]
    assert len(cells_of(*unsearched)[0].groups) == 2


def test_cells_are_data_set_model_and_budget():
    cells = cells_of(
        make_record("c", subset="cola"),
        make_record("b5", budget=0.5),
        make_record("b10", budget=10),
        change(make_record("r"), config__run__model__budget_mode="rank"),
        make_record("b2"),
    )
    assert [cell.name for cell in cells] == [
        "glue/cola, roberta-base, 0.2 %",
        "glue/sst2, roberta-base, 0.2 %",
        "glue/sst2, roberta-base, 0.5 %",
        "glue/sst2, roberta-base, rank 8",
        "glue/sst2, roberta-base, 10 %",
    ]
    assert cells[0].slug == "glue-cola-roberta-base-0.2pct"
    assert len({cell.slug for cell in cells}) == len(cells)


def test_models_of_one_name_but_other_weights_are_told_apart():
    cells = cells_of(make_record("a"), change(make_record("b"), config__run__model__pretrained_id="other/roberta"))
    assert [cell.name for cell in cells] == ["glue/sst2, other/roberta, 0.2 %", "glue/sst2, roberta-base, 0.2 %"]


def test_aggregate_of_hand_computed_values():
    given = [
        with_accuracy(make_record("p1", "proposed_fw_lora", 1, time_s=119), 0.92),
        with_accuracy(make_record("p2", "proposed_fw_lora", 2, time_s=118), 0.96),
        with_accuracy(make_record("b1", "baseline_lora", 1, time_s=99), 0.80),
        with_accuracy(make_record("b2", "baseline_lora", 2, time_s=98), 0.90),
    ]
    cells = cells_of(*given)
    document = aggregate(cells, [ComparisonWarning(None, "w"), ComparisonWarning("c", "v")])
    assert document["primary_metric"] == "eval_accuracy"
    assert document["metrics"]["eval_accuracy"] == {"p1": 0.92, "p2": 0.96, "b1": 0.80, "b2": 0.90}
    assert document["metrics"]["training_time_s"]["p1"] == 120
    assert document["best_proposed"] == {"run_id": "p2", "value": 0.96}
    assert document["best_baseline"] == {"run_id": "b2", "value": 0.90}
    assert document["gap"] == pytest.approx(0.06)
    assert document["improvement_rate"] == pytest.approx(0.06 / 0.90)
    assert document["warnings"] == ["w", "c: v"]
    assert document["cells"] == [
        {"cell": cells[0].name, "primary_metric": "eval_accuracy", **{key: document[key] for key in BEST}}
    ]
    lora, fw = describe_cells(cells)[0]["methods"]
    assert (lora["n"], lora["seeds"], lora["run_ids"]) == (2, [1, 2], ["b1", "b2"])
    assert lora["mean"] == pytest.approx(0.85)
    assert lora["sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert fw["training_time_s_mean"] == pytest.approx(120)
    assert fw["params_adapter"] == 248000
    (pair,) = compare(cells).pairs
    assert (pair.first, pair.second) == ("FW-LoRA", "LoRA")
    assert pair.primary.tests.mean == pytest.approx(0.09)
    assert pair.improvement_rate == pytest.approx(0.09 / 0.85)
    time = pair.training_time_ratio
    assert (time.ratio, time.low, time.high) == pytest.approx((1.2, 1.2, 1.2)) and time.reason is None


@pytest.mark.parametrize("baseline", [0.0, -0.1])
def test_improvement_over_what_is_not_positive_is_null(baseline: float):
    name = "summary__final_eval_matthews_correlation"
    given = [
        change(make_record("p", "proposed_fw_lora", subset="cola"), **{name: 0.5}),
        change(make_record("b", subset="cola"), **{name: baseline}),
    ]
    cells = cells_of(*given)
    written = json.loads(documents.to_json(aggregate(cells, [])))
    assert written["improvement_rate"] is None
    assert "not positive" in written["reason"]
    assert written["gap"] == pytest.approx(0.5 - baseline)
    assert written["cells"][0]["improvement_rate"] is None
    assert compare(cells).pairs[0].improvement_rate is None


def test_several_cells_have_no_common_best():
    given = [make_record("p", "proposed_fw_lora"), make_record("b"), make_record("c", subset="cola")]
    document = aggregate(cells_of(*given), [])
    assert [document[key] for key in ("primary_metric", "best_proposed", "best_baseline", "gap")] == [None] * 4
    assert "2 cells" in document["reason"]
    cola, sst2 = document["cells"]
    assert sst2["best_proposed"]["run_id"] == "p" and sst2["gap"] is not None
    assert cola["best_proposed"] is None and cola["reason"] == "no proposed run to compare with"


def test_statistics_pair_by_seed():
    given = [record for record in three_seeds() if record.run_id != "x2"]
    comparison = compare(cells_of(*given))
    lora, adalora, between = comparison.pairs
    assert (between.first, between.second, between.second_is) == ("AdaLoRA", "LoRA", "baseline")
    assert (lora.first, lora.second, lora.seeds) == ("FW-LoRA", "LoRA", (1, 3))
    assert [(seed.first_run_id, seed.second_run_id) for seed in lora.per_seed] == [("z1", "x1"), ("z3", "x3")]
    assert adalora.seeds == (1, 2, 3)
    by_id = {run.run_id: run for cell in cells_of(*given) for group in cell.groups for run in group.runs}
    differences = [by_id[f"z{s}"].values["eval_accuracy"] - by_id[f"y{s}"].values["eval_accuracy"] for s in (1, 2, 3)]
    overall = adalora.over_seeds["accuracy"]
    assert overall.tests.mean == pytest.approx(np.mean(differences))
    assert overall.tests.standard_deviation == pytest.approx(np.std(differences, ddof=1))
    assert overall.low <= overall.tests.mean <= overall.high
    expected = mcnemar_exact(by_id["z1"].labels, by_id["z1"].predictions, by_id["y1"].predictions)
    assert adalora.per_seed[0].mcnemar == expected
    p_values = [pair.primary.tests.t_p_value for pair in comparison.pairs]
    assert [pair.t_p_value_holm for pair in comparison.pairs] == holm_adjust(p_values)
    families = describe_comparison(comparison, [])["holm"]
    assert [test["p_value"] for test in families["paired_t"]] == p_values
    assert [test["p_value_holm"] for test in families["paired_t"]] == holm_adjust(p_values)
    assert [test["seed"] for test in families["mcnemar"]] == [1, 3, 1, 2, 3, 1, 3]
    mcnemar = [seed for pair in comparison.pairs for seed in pair.per_seed]
    assert [seed.mcnemar_p_value_holm for seed in mcnemar] == holm_adjust([seed.mcnemar.p_value for seed in mcnemar])


def test_the_headline_flips_runs_of_one_data_set_and_seed_together():
    given = [
        make_record(f"{m}{budget}{seed}", m, seed, budget=budget)
        for budget in (0.2, 0.5)
        for seed in (1, 2, 3, 4)
        for m in ("baseline_lora", "proposed_fw_lora")
    ]
    cells = cells_of(*given)
    comparison = compare(cells)
    (entry,) = comparison.pooled
    strata = []
    for cell in cells:
        lora, fw = (group.values("eval_accuracy") for group in cell.groups)
        values = np.array(fw) - np.array(lora)
        strata.append(values / (4 * np.sqrt(np.mean(values**2))))
    for name, terms in (("p_value", strata[0] + strata[1]), ("p_value_independent", np.concatenate(strata))):
        sums = [abs(np.dot(signs, terms)) for signs in itertools.product((1, -1), repeat=terms.size)]
        assert getattr(entry, name) == pytest.approx(np.mean(np.array(sums) >= sums[0] - 1e-12))
    assert describe_comparison(comparison, [])["holm"]["headline"] == [
        {"first": "FW-LoRA", "second": "LoRA", "p_value": entry.p_value, "p_value_holm": entry.p_value}
    ]
    assert (entry.pairs, len(entry.cells), entry.left_out) == (8, 2, ())


def test_intervals_over_examples_belong_to_their_seed():
    cells = cells_of(*three_seeds())
    runs = cells[0].runs
    resampled = resample_runs(runs, 0, 200)
    pair = compare_pairs(cells, resampled, 0).pairs[0]
    for seed in pair.per_seed:
        scores = [resampled.scores[run_id, "accuracy"] for run_id in (seed.first_run_id, seed.second_run_id)]
        expected = np.quantile(scores[0] - scores[1], [0.025, 0.975])
        interval = seed.intervals["accuracy"]
        assert [interval.low, interval.high] == pytest.approx(list(expected))


def test_the_improvement_rate_is_of_the_paired_seeds():
    given = [with_accuracy(make_record(f"b{s}", seed=s), v) for s, v in ((1, 0.8), (2, 0.5))]
    given += [with_accuracy(make_record(f"p{s}", "proposed_fw_lora", s), v) for s, v in ((1, 0.88), (3, 0.1))]
    (pair,) = compare(cells_of(*given)).pairs
    assert pair.improvement_rate == pytest.approx(0.1)


def test_folders_that_end_alike_are_told_apart():
    given = [change(make_record(run_id), config__run__dataset__name=f"/{run_id}/data") for run_id in ("a", "b")]
    cells = cells_of(*given)
    assert [cell.name for cell in cells] == ["/a/data/sst2, roberta-base, 0.2 %", "/b/data/sst2, roberta-base, 0.2 %"]
    assert [cell.data for cell in cells] == ["/a/data/sst2", "/b/data/sst2"]


def test_intervals_do_not_depend_on_other_runs():
    few = [record for record in three_seeds() if not record.run_id.startswith("x")]
    of_few = compare(cells_of(*few)).pairs[0]
    of_all = compare(cells_of(*reversed(three_seeds()))).pairs[1]
    assert (of_few.over_seeds, of_few.training_time_ratio) == (of_all.over_seeds, of_all.training_time_ratio)
    assert [seed.intervals for seed in of_few.per_seed] == [seed.intervals for seed in of_all.per_seed]


def test_one_seed_has_no_seed_level_test():
    pair = compare(cells_of(make_record("p", "proposed_fw_lora"), make_record("b"))).pairs[0]
    assert pair.seed_level_test == "no seed-level test possible: one paired seed"
    tests = pair.over_seeds["accuracy"].tests
    assert (tests.t_p_value, tests.standard_deviation, pair.primary.interval_over) == (None, None, "examples")


def test_methods_without_a_common_seed_are_not_paired():
    cells = cells_of(make_record("p", "proposed_fw_lora", 1), make_record("b", seed=2))
    comparison = compare(cells)
    (pair,) = comparison.pairs
    assert (pair.primary, pair.per_seed, pair.training_time_ratio) == (None, (), None)
    assert "no seed was run with both" in pair.seed_level_test
    document = describe_comparison(comparison, cells)
    assert document["pairs"][0]["over_seeds"] == {} and document["holm"]["mcnemar"] == []
    assert "training_time_ratio" not in document["pairs"][0]
    texts = [warning.text for warning in warn(cells)]
    assert any("unequal seeds" in text and "0 can be paired" in text for text in texts)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ({"config__run__optuna__n_trials": 30}, "unequal search: optuna.n_trials is 0 for LoRA, 30 for FW-LoRA"),
        ({"config__resolved__precision": "fp32"}, "unequal precision: bf16 for b, fp32 for p"),
        (
            {"config__run__training__epochs": 5},
            "unequal training settings: training.epochs is 3 for LoRA, 5 for FW-LoRA",
        ),
        ({"config__run__dataset__max_length": 64}, "unequal data: dataset.max_length is 128 for LoRA, 64 for FW-LoRA"),
        ({"summary__total_steps": 59}, "unequal steps: 60 for b, 59 for p"),
        ({"config__resolved__environment": {"device": "H200"}}, "unequal hardware: None for b, H200 for p"),
        ({"config__engine": {"fast": False}}, "unequal engine (fast): None for b, False for p"),
        ({"summary__encoder_fingerprint": "w"}, "unequal encoder weights: None for b, w for p"),
        ({"config__resolved__train_fingerprint": "f"}, "unequal data (train_fingerprint): None for b, f for p"),
        ({"summary__final_eval_accuracy": 0.5}, "run p records accuracy 0.5000, its predictions give"),
        ({"summary__budget_parameters": 400000}, "run p uses 248000 adapter parameters, 62 % of its budget of 400000"),
        ({"summary__budget_parameters": 1000}, "run p uses 248000 adapter parameters, 24800 % of its budget of 1000"),
    ],
)
def test_unequal_comparisons_are_flagged(paths, expected):
    baseline, proposed = make_record("b"), make_record("p", "proposed_fw_lora")
    assert warn(cells_of(baseline, proposed)) == []
    (warning,) = warn(cells_of(baseline, change(proposed, **paths)))
    assert expected in warning.text and warning.cell == "glue/sst2, roberta-base, 0.2 %"


def test_search_spaces_count_only_where_there_is_a_search():
    baseline, proposed = make_record("b"), make_record("p", "proposed_fw_lora")
    space = {"lambda_fw": {"type": "loguniform", "low": 1e-5, "high": 1e-4}}
    proposed = change(proposed, config__run__optuna__search_space=space)
    assert warn(cells_of(baseline, proposed)) == []
    searching = [change(record, config__run__optuna__n_trials=5) for record in (baseline, proposed)]
    assert any("optuna.search_space" in warning.text for warning in warn(cells_of(*searching)))


def test_a_control_that_wins_is_not_sold_as_the_method():
    uniform = change(with_accuracy(make_record("u", "proposed_fw_lora"), 1.0), config__run__fw_lora__importance="none")
    proposed = with_accuracy(make_record("p", "proposed_fw_lora"), 0.9)
    document = aggregate(cells_of(make_record("b"), proposed, uniform), [])
    assert (document["best_proposed"]["run_id"], document["best_baseline"]["run_id"]) == ("p", "u")
    assert document["gap"] == pytest.approx(-0.1)


def test_constant_predictions_are_counted_not_dropped():
    constant = change(make_record("b"), summary__eval_predictions=pack_classes(np.ones(400, dtype=int), 2))
    cells = cells_of(constant, make_record("p", "proposed_fw_lora"))
    assert any("predicts one class" in warning.text for warning in warn(cells))
    assert [method["constant_predictions"] for method in describe_cells(cells)[0]["methods"]] == [1, 0]


def predicting(record, predictions, accuracy: float):
    return change(record, summary__eval_predictions=pack_classes(predictions, 2), summary__final_eval_accuracy=accuracy)


def test_runs_that_did_not_learn_are_named_with_what_they_are_not_above():
    """270 of 400 examples are of class 0: 67.5 % by always predicting it."""
    labels = (np.arange(400) >= 270).astype(int)
    gold = {"summary__eval_labels": pack_classes(labels, 2)}

    def run(name: str, right: int, method: str = "baseline_lora", seed: int = 1):
        order = np.random.default_rng(seed).permutation(400)
        predictions = np.where(np.isin(np.arange(400), order[:right]), labels, 1 - labels)
        mcc = float(matthews_corrcoef(labels, predictions))
        record = predicting(make_record(name, method, seed), predictions, right / 400)
        return change(record, **gold, summary__final_eval_matthews_correlation=mcc)

    cells = cells_of(run("below", 84), run("near", 281, seed=2), run("above", 360, "proposed_fw_lora"))
    texts = [warning.text for warning in warn(cells)]
    told = [text for text in texts if "learn" in text]
    reference = "the 0.675 of always predicting negative"
    assert told == [
        f"run below did not learn: accuracy 0.210, not above {reference} (counted, not dropped)",
        f"run near is not shown to have learned: accuracy 0.703, within its interval {reference}",
    ]
    by_id = {run.run_id: run for cell in cells for run in cell.runs}
    assert [has_learned(by_id[name]) for name in ("below", "near", "above")] == [False, True, True]
    assert score_constant(by_id["above"]) == ConstantReference(0.675, "negative")


def test_methods_that_predict_the_same_are_suspect():
    first, second = make_record("b"), make_record("p", "proposed_fw_lora")
    second = change(second, summary__eval_predictions=first.summary["eval_predictions"])
    texts = [warning.text for warning in warn(cells_of(first, second))]
    assert any("runs b and p predict the same for every example" in text for text in texts)
    assert not any("predict the same" in w.text for w in warn(cells_of(make_record("b"), make_record("c", seed=2))))


def test_examples_that_were_cut_are_warned_of():
    cut = change(make_record("b"), config__resolved__train_examples_cut=12, config__resolved__eval_examples_cut=0)
    texts = [warning.text for warning in warn(cells_of(cut, make_record("p", "proposed_fw_lora")))]
    assert [text for text in texts if "cut" in text] == [
        "run b: 12 training examples were longer than max_length and cut"
    ]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ({"state": "crashed"}, "is unfinished: it crashed, it was killed, or the end of its record is damaged"),
        ({"state": "failed"}, "is unfinished: it failed or was killed"),
        ({"state": "running"}, "is unfinished: it still runs"),
        ({"summary__completed": None}, "is unfinished"),
        ({"summary__final_eval_accuracy": None}, "has no final_eval_accuracy"),
        ({"summary__final_eval_accuracy": math.nan}, "has final_eval_accuracy = nan"),
        ({"summary__final_eval_accuracy": "NaN"}, "has final_eval_accuracy = NaN"),
        ({"summary__primary_metric": "loss"}, "has the primary metric 'loss'"),
        ({"summary__final_eval_matthews_correlation": None}, "has no final_eval_matthews_correlation"),
        ({"summary__training_time_s": None}, "has no training_time_s"),
        ({"summary__eval_predictions": None}, "has no eval_predictions"),
        ({"summary__eval_predictions": {"encoding": "zip", "count": 1, "data": ""}}, "cannot be read"),
        ({"summary__eval_predictions": pack_classes(np.zeros(399, dtype=int), 2)}, "399 predictions for 400 labels"),
        ({"config__resolved__label_names": None}, "records no label names"),
        ({"config__run": None}, "records no settings"),
        (
            {"config__run": {"method": "m", "dataset": "glue", "training": "fast"}},
            "does not record the setting dataset.name",
        ),
        (
            {"config__run__training__seed": "first"},
            "records what src.train does not write (ValueError: invalid literal",
        ),
        ({"config__run__training__seed": 1.5}, "training.seed is 1.5, which is no whole number"),
        ({"summary__training_time_s": -1.0}, "has training_time_s = -1.0, which is no duration"),
        (
            {"config__run__run_id": "other"},
            "is the record of another run, 'other'",
        ),
        ({"config__run__model": ["roberta"]}, "records what src.train does not write (AttributeError"),
        ({"config__resolved": "none"}, "records what src.train does not write (AttributeError"),
        ({"summary__eval_predictions": "AAAA"}, "predictions or labels that cannot be read"),
        ({"config__run__training__seed": None}, "does not record the setting training.seed"),
        ({"history": []}, "has no eval_accuracy in its history"),
    ],
)
def test_runs_that_cannot_be_compared_are_all_named(paths, expected):
    broken = change(make_record("broken"), **paths)
    other = change(make_record("other"), state="failed")
    with pytest.raises(UserError) as raised:
        read_runs([make_record("good", seed=7), broken, other])
    message = str(raised.value)
    assert f"run 'broken' {expected}" in message or expected in message
    assert "'other' is unfinished" in message and "'good'" not in message


def test_an_option_of_another_type_is_refused_by_its_range():
    broken = change(make_record("broken", "proposed_fw_lora"), config__run__fw_lora__fisher_alpha=[])
    with pytest.raises(UserError, match=r"run 'broken' records what src.train does not write \(ValueError: `decay` is"):
        read_runs([broken])


def test_runs_evaluated_on_different_examples_are_refused():
    with pytest.raises(UserError, match=r"different examples.*a \(fingerprint-sst2-400\), b \(other\)"):
        read_runs([make_record("a"), change(make_record("b", seed=2), summary__eval_fingerprint="other")])
    read_runs([make_record("a"), make_record("b", subset="cola")])
    with pytest.raises(UserError, match=r"glue/sst2: runs were evaluated on different examples"):
        read_runs([make_record("a"), change(make_record("b", budget=0.5), summary__eval_fingerprint="other")])


def test_a_repeated_seed_is_refused():
    with pytest.raises(UserError, match="runs a, b record the same settings and the same seed"):
        read_runs([make_record("a"), make_record("b")])


def test_json_has_no_non_finite_numbers():
    text = documents.to_json({"a": [math.nan, "NaN", {"b": math.inf}], "c": 1.5})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, {"b": None}], "c": 1.5}


def test_tables_hold_every_method_and_pair():
    cells = cells_of(*three_seeds())
    comparison = compare(cells)
    markdown = tables.render_markdown([], cells, comparison, [ComparisonWarning(None, "something | unequal")])
    group = cells[0].groups[2]
    mean, deviation = (
        100 * value for value in (group.mean("eval_accuracy"), group.standard_deviation("eval_accuracy"))
    )
    score = f"{mean:.2f} ± {deviation:.2f}"
    assert f"| glue/sst2, roberta-base, 0.2 % | FW-LoRA | 3 | Acc. | {score} | {score} |" in markdown
    tests = comparison.pairs[0].primary.tests
    assert f"| {100 * tests.mean:+.2f} | [" in markdown
    assert f"| {tests.hedges_g:.2f} | {100 * tests.minimum_detectable_difference:.2f} |" in markdown
    assert "- something | unequal" in markdown
    latex = tables.render_latex(cells, comparison)
    assert rf"glue/sst2, roberta-base, 0.2 \% & FW-LoRA & 3 & Acc. & {mean:.2f} $\pm$ {deviation:.2f} &" in latex
    assert latex.count(r"\toprule") == 3 and r"\begin{tabular}{llrlrrrr}" in latex
    assert tables._escape_latex("a_b 1 -> 2 <0.001 -0.5 x-ray {%}") == (
        r"a\_b 1 $\rightarrow$ 2 $<$0.001 $-$0.5 x-ray \{\%\}"
    )
    header, *lines = tables.render_csv(cells).splitlines()
    assert header.startswith("cell,method,primary_metric,n,seeds,eval_accuracy_mean,eval_accuracy_sd")
    assert lines[2].split('"')[2].startswith(f",FW-LoRA,eval_accuracy,3,1 2 3,{group.mean('eval_accuracy')},")
    wide = cells_of(change(make_record("b"), config__run__model__name="模型"), make_record("c", subset="cola"))
    lines = tables.render_text_table(wide).splitlines()
    assert len({len(line) + line.count("模型") * 2 for line in lines[1:]}) == 1, "a wide character fills two columns"
    header, *lines = tables.render_text_table(cells).splitlines()
    assert all(line[: header.index("metric")].endswith("  3  ") for line in lines)


def test_tables_hold_text_that_no_program_acts_on():
    given = [change(make_record(name), config__run__model__name=model) for name, model in (("b", "=1+1"), ("c", "@x"))]
    cells = cells_of(*given)
    rows = list(csv.reader(io.StringIO(tables.render_csv(cells))))
    assert all(not row[0].startswith(("=", "+", "-", "@")) for row in rows)
    labelled = cells_of(change(make_record("b"), config__run__method="=cmd|' /C calc'!A0"))
    assert "'=cmd|" in tables.render_csv(labelled)
    page = cells_of(change(make_record("b"), config__run__model__name="<img src=x onerror=alert(1)> | & \n two"))
    written = tables.render_markdown([], page, compare(page), [ComparisonWarning(None, "<script>")])
    assert (
        "<img" not in written
        and "<script" not in written
        and "&lt;img src=x onerror=alert(1)> \\| &amp; two" in written
    )
