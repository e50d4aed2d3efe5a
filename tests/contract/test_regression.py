"""STS-B as GLUE has it, pairs of sentences and a number, from files to the comparison of two methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.tracking.records import RunRecord, unpack_values
from src.train import run_training
from tests.helpers.paths import CONFIG_DIR

RUNS = ("proposed-roberta-base-110M--CoLA-GLUE", "comparative-1-roberta-base-110M--CoLA-GLUE")
WORDS = np.array(["the", "dog", "cat", "runs", "sleeps", "fast"])


@pytest.fixture
def similarity(tmp_path: Path) -> Path:
    """Pairs of sentences; the label is five times the share of places with the same word."""
    generator = np.random.default_rng(0)
    for split, rows in (("train", 120), ("validation", 50)):
        first, second = generator.choice(WORDS, (2, rows, 6))
        second = np.where(generator.random((rows, 6)) < generator.random((rows, 1)), first, second)
        frame = pd.DataFrame(
            {
                "sentence1": [" ".join(words) for words in first],
                "sentence2": [" ".join(words) for words in second],
                "label": 5 * (first == second).mean(axis=1),
            }
        )
        frame.to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def make_record(run_id: str, model: Path, data: Path, recorded, *overrides: str) -> RunRecord:
    arguments = [
        f"run={run_id}", "mode=full", "results_dir=results", f"run.model.pretrained_id={model}",
        "run.model.parameter_budget_percent=5.0", f"run.dataset.name={data}", "run.dataset.subset=stsb",
        "run.training.epochs=2", "run.training.mixed_precision=fp32", *overrides,
    ]  # fmt: skip
    run_training(compose_settings(arguments, CONFIG_DIR, {}))
    return recorded[-1].record(run_id)


def test_two_methods_are_compared_by_pearson_correlation(similarity, tiny_roberta, recorded, caplog):
    caplog.set_level("INFO", "fwlora")
    lengths = {RUNS[0]: ["run.fw_lora.warmup_steps=2", "run.fw_lora.lambda_fw=10.0"], RUNS[1]: []}
    records = [
        make_record(
            run_id,
            tiny_roberta,
            similarity,
            recorded,
            "run.training.learning_rate=0.001",
            "run.optuna.n_trials=0",
            *more,
        )
        for run_id, more in lengths.items()
    ]
    assert "120 training and 50 evaluation examples, labels are numbers" in caplog.text
    expected = pd.read_parquet(similarity / "validation.parquet").label.to_numpy()
    for record in records:
        labels, predictions = (unpack_values(record.summary[name]) for name in ("eval_labels", "eval_predictions"))
        assert labels == pytest.approx(expected, abs=1e-6)
        pearson, spearman = (
            function(labels.astype(float), predictions.astype(float)).statistic
            for function in (scipy.stats.pearsonr, scipy.stats.spearmanr)
        )
        assert record.summary["final_eval_pearson_correlation"] == pytest.approx(pearson, abs=1e-6)
        assert record.summary["final_eval_spearman_correlation"] == pytest.approx(spearman, abs=1e-6)
        assert record.summary["final_eval_loss"] == pytest.approx(np.mean((predictions - expected) ** 2), rel=1e-4)
        assert record.summary["primary_metric"] == "eval_pearson_correlation"
        assert record.summary["best_eval_loss"] <= record.summary["final_eval_loss"]
        assert "final_eval_accuracy" not in record.summary and record.resolved["label_names"] == []
    evidence = gather_evidence(records, {}, resamples=100)
    (pair,) = evidence.comparison.pairs
    first, second = (record.summary["final_eval_pearson_correlation"] for record in records)
    assert (
        first != second
        and pair.primary.tests.mean == pytest.approx(first - second)
        and pair.per_seed[0].mcnemar is None
    )


def test_a_search_scores_numbers_on_held_out_examples(similarity, tiny_roberta, recorded):
    space = "{learning_rate: {type: uniform, low: 0.001, high: 0.01}}"
    overrides = ["run.optuna.n_trials=2", f"run.optuna.search_space={space}"]
    record = make_record(RUNS[1], tiny_roberta, similarity, recorded, *overrides)
    search = record.config["search"]
    assert search["completed_trials"] == 2 and -1 <= search["best_objective"] <= 1
    assert record.config["run"]["training"]["learning_rate"] == search["best_values"]["learning_rate"]
