"""A task whose labels are numbers, through the whole evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.compare.bootstrap import resample_scores
from fwlora.experiment.evaluation.compare.comparability import find_disagreement
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.evaluate import evaluate_records
from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.output.documents import describe_comparison, describe_run, to_json
from fwlora.experiment.evaluation.report.render import ReportOrigin
from fwlora.experiment.tracking.records import pack_values, unpack_values
from tests.helpers.evaluation_records import change, make_labels, make_record


def make_records(seeds=(1, 2, 3), subset: str = "stsb") -> list:
    proposed = [make_record(f"p{seed}", "proposed_fw_lora", seed, 0.08, subset) for seed in seeds]
    return [*proposed, *(make_record(f"b{seed}", "baseline_lora", seed, 0.12, subset) for seed in seeds)]


def test_packed_numbers_come_back():
    values = make_labels(7, 1)
    packed = pack_values(values, 1)
    assert packed["encoding"] == "float32" and packed["count"] == 7
    assert unpack_values(packed).tolist() == values.tolist() and unpack_values(packed).dtype == np.float32
    with pytest.raises(ValueError, match="7 values are packed, 8 announced"):
        unpack_values({**packed, "count": 8})


def test_a_run_of_numbers():
    (run,) = read_runs([make_record("b", subset="stsb")])
    gold, predicted = run.labels.astype(float), run.predictions.astype(float)
    assert not run.has_classes and run.primary == "pearson_correlation"
    assert run.values["eval_pearson_correlation"] == pytest.approx(scipy.stats.pearsonr(gold, predicted).statistic)
    assert run.values["eval_spearman_correlation"] == pytest.approx(scipy.stats.spearmanr(gold, predicted).statistic)
    assert "eval_accuracy" not in run.values and find_disagreement(run) is None
    described = describe_run(run)
    assert (
        described["confusion_matrix"] is None and described["primary_value"] == run.values["eval_pearson_correlation"]
    )


def test_a_recorded_value_that_the_predictions_do_not_give_is_found():
    for name in ("pearson_correlation", "spearman_correlation"):
        (run,) = read_runs([change(make_record("b", subset="stsb"), **{f"summary__final_eval_{name}": 0.5})])
        assert f"run b records {name} 0.5000, its predictions give" in find_disagreement(run)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"summary__eval_predictions": pack_values(np.zeros(400, int), 2)},
            "no numbers, which its primary metric needs",
        ),
        ({"summary__eval_predictions": pack_values(np.zeros(3), 1)}, "has 3 predictions for 400 labels"),
        (
            {"summary__eval_predictions": pack_values(np.full(400, np.nan), 1)},
            "predictions or labels that are not finite",
        ),
        ({"config__resolved__label_names": ["a", "b"]}, "has a primary metric of numbers and 2 label names"),
        ({"summary__final_eval_spearman_correlation": None}, "has no final_eval_spearman_correlation"),
        ({"summary__primary_metric": "eval_accuracy"}, "has no final_eval_accuracy"),
    ],
)
def test_records_that_do_not_fit(changes, expected):
    with pytest.raises(UserError, match=expected):
        read_runs([change(make_record("b", subset="stsb"), **changes)])


def test_the_bootstrap_draws_equal_examples_for_classes_and_numbers():
    """With gold classes 0 and 1 as numbers, Pearson's correlation is Matthews'."""
    labels = make_labels(80)
    predictions = np.stack([labels, 1 - labels, (labels + (np.arange(80) % 3 == 0)) % 2])
    classes = resample_scores(labels, predictions, ["matthews_correlation"], 2, np.random.default_rng(5), 1500)
    numbers = resample_scores(
        labels.astype(np.float32),
        predictions.astype(np.float32),
        ["pearson_correlation"],
        0,
        np.random.default_rng(5),
        1500,
    )
    assert numbers["pearson_correlation"] == pytest.approx(classes["matthews_correlation"], abs=1e-9)
    with pytest.raises(ValueError, match="'accuracy' is no metric of numbers"):
        resample_scores(labels, predictions, ["accuracy"], 0, np.random.default_rng(5), 10)


def test_comparisons_of_numbers_have_no_test_of_accuracy():
    evidence = gather_evidence(make_records(), {}, resamples=200)
    (pair,) = evidence.comparison.pairs
    assert pair.primary_metric == "pearson_correlation"
    assert set(pair.over_seeds) == {"pearson_correlation", "spearman_correlation"}
    values = {run.run_id: run.values["eval_pearson_correlation"] for run in evidence.runs}
    expected = np.mean([values[f"p{seed}"] - values[f"b{seed}"] for seed in (1, 2, 3)])
    assert pair.primary.tests.mean == pytest.approx(expected) and pair.primary.low < expected < pair.primary.high
    assert [seed.mcnemar for seed in pair.per_seed] == [None] * 3
    assert [seed.mcnemar_p_value_holm for seed in pair.per_seed] == [None] * 3
    document = json.loads(to_json(describe_comparison(evidence.comparison, evidence.cells)))
    assert document["holm"]["mcnemar"] == [] and len(document["holm"]["paired_t"]) == 1
    assert document["cells"][0]["methods"][0]["accuracy_mean"] is None


def test_cells_of_numbers_and_of_classes_are_pooled_and_corrected_apart():
    mixed = gather_evidence([*make_records(), *rename(make_records(subset="sst2"))], {}, resamples=200)
    alone = gather_evidence(rename(make_records(subset="sst2")), {}, resamples=200)
    assert [cell.primary for cell in mixed.cells] == ["accuracy", "pearson_correlation"]
    assert mixed.comparison.pooled[0].pairs == 6
    of_classes = mixed.comparison.pairs[0].per_seed
    assert [seed.mcnemar for seed in of_classes] == [seed.mcnemar for seed in alone.comparison.pairs[0].per_seed]
    holm = [seed.mcnemar_p_value_holm for seed in of_classes]
    assert holm == [seed.mcnemar_p_value_holm for seed in alone.comparison.pairs[0].per_seed]


def rename(records: list) -> list:
    return [change(record, run_id=f"c-{record.run_id}", config__run__run_id=f"c-{record.run_id}") for record in records]


def test_files_and_report(tmp_path: Path):
    origin = ReportOrigin("python -m src.evaluate", {})
    evaluation = evaluate_records(make_records((1, 2)), tmp_path, {}, origin, workers=1)
    names = {path.relative_to(tmp_path).as_posix() for path in evaluation.files}
    assert any(name.startswith("p1/") and "predictions" in name for name in names)
    assert not any("confusion" in name or "accuracy" in name for name in names)
    assert sum("spearman_correlation" in name for name in names) == 2  # bars and boxes
    (page,) = (content.decode() for path, content in evaluation.files.items() if path.suffix == ".html")
    assert "Predicted against gold numbers after the last epoch" in page
    assert "gold classes down" not in page and "Pearson correlation" in page
