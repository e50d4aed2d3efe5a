"""Whole runs in this process: trials of every run file, and full runs on a tiny model with their records."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import src.train
from fwlora.adapters import find_adapter_pairs
from fwlora.experiment.data.tokenization import tokenize
from fwlora.experiment.engine.loop import EvaluationResult, TrainingResult, evaluate
from fwlora.experiment.errors import UserError
from fwlora.experiment.fused.forward import PlainClassifier
from fwlora.experiment.settings.hydra_arguments import compose_settings, known_run_ids
from fwlora.experiment.settings.search_space import Categorical, IntRange
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.records import unpack_values
from src.model import build_model, plan_adapters
from src.train import run_training
from tests.helpers.full_runs import METHODS, compose, full_run
from tests.helpers.paths import CONFIG_DIR


@pytest.fixture(autouse=True)
def _log_lines(caplog) -> None:
    caplog.set_level("INFO", "fwlora")


@pytest.mark.parametrize("run_id", known_run_ids(CONFIG_DIR))
def test_trial_of_every_run_file_takes_every_path(run_id, tiny_roberta, tiny_glue, monkeypatch, tmp_path):
    summaries = []
    monkeypatch.setattr(
        src.train,
        "summarize_run",
        lambda *args, _real=src.train.summarize_run: summaries.append(_real(*args)) or summaries[-1],
    )
    settings = compose(run_id, tiny_roberta, tiny_glue, mode="trial")
    run_training(settings)
    (summary,) = summaries
    assert summary[metrics.TOTAL_STEPS] == 2
    assert len(unpack_values(summary[metrics.EVAL_PREDICTIONS])) == summary[metrics.EVAL_LABELS]["count"] <= 64
    assert np.isfinite(summary["final_" + summary[metrics.PRIMARY_METRIC]])
    if settings.run.method == "proposed_fw_lora":
        expected = 0.0 if settings.run.fw_lora.importance == "none" else 1.0
        assert sum(summary[metrics.MODULE_IMPORTANCES]) == pytest.approx(expected)
        assert summary[metrics.TIME_WARMUP_S] > 0 and summary[metrics.TIME_TRAIN_S] > 0
    if settings.run.method == "adalora":
        assert summary[metrics.PARAMS_ADAPTER_FINAL] < summary[metrics.PARAMS_ADAPTER]
    assert summary[metrics.PARAMS_ADAPTER_FINAL] <= summary[metrics.BUDGET_PARAMETERS]
    assert not (tmp_path / "results").exists(), "a trial leaves no result behind"


@pytest.mark.parametrize("estimator", ["exact", "adapter"])
def test_reallocated_ranks_are_recorded_and_saved(estimator, tiny_roberta, tiny_glue, recorded):
    arguments = ["run.fw_lora.allocation=reallocate", f"run.fw_lora.estimator={estimator}"]
    settings, tracker = full_run("proposed_fw_lora", tiny_roberta, tiny_glue, recorded, *arguments)
    initial = plan_adapters(settings.run.model).ranks
    record = tracker.record(settings.run.run_id)
    names, ranks = record.summary[metrics.MODULE_NAMES], record.summary[metrics.MODULE_RANKS]
    assert dict(zip(names, ranks, strict=True)) != {name: rank for name, rank in initial.items() if rank}
    assert len(record.summary[metrics.MODULE_IMPORTANCES]) == len(names)
    final, first = record.summary[metrics.PARAMS_ADAPTER_FINAL], record.summary[metrics.PARAMS_ADAPTER]
    assert 0.9 * first < final <= first <= record.summary[metrics.BUDGET_PARAMETERS]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta)
    loaded = PeftModel.from_pretrained(base, Path("results") / settings.run.run_id / "adapter")
    saved = {pair.name: pair.rank for pair in find_adapter_pairs(loaded)}
    assert saved == {name: rank for name, rank in zip(names, ranks, strict=True) if rank}


@pytest.mark.parametrize("method", METHODS)
def test_full_run_records_what_evaluation_needs(method, tiny_roberta, tiny_glue, recorded, tmp_path):
    settings, tracker = full_run(method, tiny_roberta, tiny_glue, recorded)
    record = tracker.record(settings.run.run_id)
    summary, rows = record.summary, record.history
    assert tracker.exit_code == 0 and summary[metrics.COMPLETED] is True
    assert record.config["run"]["run_id"] == settings.run.run_id
    assert record.config["resolved"]["label_names"] == ["0", "1"]
    assert record.config["resolved"]["environment"]["packages"]["peft"]
    assert [row[metrics.GLOBAL_STEP] for row in rows] == list(range(1, 31))
    evaluations = [row for row in rows if metrics.EVAL_LOSS in row]
    assert len(evaluations) == 3
    assert summary["final_eval_accuracy"] == evaluations[-1]["eval_accuracy"]
    assert summary["best_eval_accuracy"] == max(row["eval_accuracy"] for row in evaluations)
    assert summary["best_eval_loss"] == min(row["eval_loss"] for row in evaluations)
    parts = summary[metrics.TIME_WARMUP_S] + summary[metrics.TIME_TRAIN_S]
    assert summary[metrics.TRAINING_TIME_S] == parts
    assert (summary[metrics.TIME_WARMUP_S] > 0) == (method == "proposed_fw_lora")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta)
    alone = sum(p.numel() for p in base.parameters())
    assert summary[metrics.PARAMS_TOTAL] == alone + summary[metrics.PARAMS_ADAPTER]
    predictions, labels = (unpack_values(summary[name]) for name in (metrics.EVAL_PREDICTIONS, metrics.EVAL_LABELS))
    assert np.mean(predictions == labels) == pytest.approx(summary["final_eval_accuracy"])
    assert summary[metrics.PARAMS_TRAINABLE] == summary[metrics.PARAMS_ADAPTER] + summary[metrics.PARAMS_HEAD]
    assert summary[metrics.PARAMS_ADAPTER_FINAL] <= summary[metrics.BUDGET_PARAMETERS]
    lists = [summary[name] for name in (metrics.MODULE_NAMES, metrics.MODULE_RANKS, metrics.MODULE_DELTA_NORMS)]
    assert len({len(values) for values in lists}) == 1
    penalties = [row[metrics.PENALTY] for row in rows]
    if method == "proposed_fw_lora":
        assert [row[metrics.FISHER_WARMUP] for row in rows] == [1.0] * 5 + [0.0] * 25
        assert penalties[:5] == [0.0] * 5 and all(value > 0 for value in penalties[5:])
    elif method == "baseline_lora":
        assert set(penalties) == {0.0} and set(summary[metrics.MODULE_IMPORTANCES]) == {None}
    else:
        checkpoint = load_file(tmp_path / "results" / settings.run.run_id / "adapter" / "adapter_model.safetensors")
        kept = {name: A.shape[0] for name, A in checkpoint.items() if name.endswith("lora_A.weight")}
        assert sum(kept.values()) == sum(summary[metrics.MODULE_RANKS]), "no pruned triplet came back"
        ranks = [row[metrics.ACTIVE_RANK] for row in rows]
        assert ranks[-1] < ranks[0]
        assert 0.98 <= summary[metrics.PARAMS_ADAPTER_FINAL] / summary[metrics.BUDGET_PARAMETERS] <= 1
        assert ranks[-1] == sum(summary[metrics.MODULE_RANKS])
    written = {
        path.relative_to(tmp_path / "results").parts[1] for path in (tmp_path / "results").rglob("*") if path.is_file()
    }
    assert written == {"adapter", "attempts"}


def test_reported_values_are_the_last_epochs_even_where_another_was_better(tiny_roberta, tiny_glue, monkeypatch):
    rows = [{"epoch": e, "eval_loss": loss, "eval_accuracy": acc} for e, loss, acc in ((1, 0.3, 0.9), (2, 0.5, 0.8))]
    last = EvaluationResult(0.5, {"eval_loss": 0.5, "eval_accuracy": 0.8}, np.array([0, 1]))
    result = TrainingResult(last, rows, {"warmup": 2.0, "train": 3.0, "eval": 1.0}, [0.1, 0.3], 2, 10.0)
    run = compose("comparative-1-roberta-base-110M--CoLA-GLUE", tiny_roberta, tiny_glue)
    prepared = src.train.prepare_inputs(run)
    adapted = build_model(run.run, prepared.plan, 2, 1, 900, torch.device("cpu"))
    prepared = replace(prepared, evaluation=prepared.evaluation.select(np.array([0, 1])))
    summary = src.train.summarize_run(result, adapted, prepared, 0.0)
    assert (summary["final_eval_accuracy"], summary["best_eval_accuracy"]) == (0.8, 0.9)
    assert (summary["final_eval_loss"], summary["best_eval_loss"]) == (0.5, 0.3)
    assert summary["best_eval_accuracy_epoch"] == summary["best_eval_loss_epoch"] == 1
    assert summary[metrics.TRAINING_TIME_S] == 5.0 and summary[metrics.STEP_TIME_MEDIAN_S] == 0.2


def test_settings_of_the_method_reach_it(tiny_roberta, tiny_glue, recorded):
    full_run("proposed_fw_lora", tiny_roberta, tiny_glue, recorded, "run.fw_lora.importance=none")
    assert set(recorded[-1].summary[metrics.MODULE_IMPORTANCES]) == {0.0}
    for strength in ("1.0e-3", "2.0e-3"):
        full_run("proposed_fw_lora", tiny_roberta, tiny_glue, recorded, f"run.fw_lora.lambda_fw={strength}")
    first = [t.record("x").history[5][metrics.PENALTY] for t in recorded[1:]]
    assert first[1] == pytest.approx(2 * first[0], rel=1e-6) and first[0] > 0


# PEFT writes AdaLoRA's pattern under names that its own loader then calls unmatched.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_saved_checkpoint_predicts_what_was_recorded(method, tiny_roberta, tiny_glue, recorded, tmp_path):
    settings, tracker = full_run(method, tiny_roberta, tiny_glue, recorded, "run.training.mixed_precision=fp32")
    prepared = src.train.prepare_inputs(settings)
    split = tokenize(prepared.data.evaluation, prepared.tokenizer, settings.run.dataset)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta)
    model = PeftModel.from_pretrained(base, tmp_path / "results" / settings.run.run_id / "adapter")
    again = evaluate(PlainClassifier(model), split, 32, prepared.task, prepared.engine)
    assert again.loss == pytest.approx(tracker.summary["final_eval_loss"], rel=1e-5)
    assert again.predictions.tolist() == unpack_values(tracker.summary[metrics.EVAL_PREDICTIONS]).tolist()


def test_equal_seeds_give_every_method_the_same_head_and_lora_adapters(tiny_roberta, tiny_glue):
    heads, adapters = [], []
    for prefix, seed in [*((prefix, 42) for prefix in METHODS.values()), ("proposed", 43)]:
        torch.rand(seed % 7)  # whatever was drawn before must not matter
        arguments = [f"run.training.seed={seed}"]
        run = compose(f"{prefix}-roberta-base-110M--CoLA-GLUE", tiny_roberta, tiny_glue, *arguments).run
        adapted = build_model(run, plan_adapters(run.model), 2, 1, 900, torch.device("cpu"))
        heads.append({n: p for n, p in adapted.model.named_parameters() if "classifier" in n and p.requires_grad})
        adapters.append([pair.A.detach() for pair in adapted.method.pairs])
    assert len(heads[0]) == 4
    for other in heads[1:3]:
        assert all(torch.equal(heads[0][name], other[name]) for name in heads[0])
    assert all(torch.equal(a, b) for a, b in zip(adapters[0], adapters[2], strict=True))
    weights = [name for name in heads[0] if name.endswith("weight")]
    assert not any(torch.equal(heads[0][name], heads[3][name]) for name in weights), "heads are drawn, not loaded"
    assert not torch.equal(adapters[0][0], adapters[3][0])


def test_first_steps_are_shared_until_the_warmup_ends(tiny_roberta, tiny_glue, recorded):
    for method in ("baseline_lora", "proposed_fw_lora"):
        full_run(method, tiny_roberta, tiny_glue, recorded, "run.training.learning_rate=0.01")
    lora, weighted = ([row["train_loss"] for row in t.rows if "train_loss" in row] for t in recorded)
    assert lora[:6] == weighted[:6]
    assert lora[6:] != weighted[6:]


def test_runs_are_repeatable_and_seeds_matter(tiny_roberta, tiny_glue, recorded):
    for seed in (1, 1, 2):
        full_run("adalora", tiny_roberta, tiny_glue, recorded, seed=seed)
    losses = [[row["train_loss"] for row in t.rows if "train_loss" in row] for t in recorded]
    assert losses[0] == losses[1] != losses[2]


def test_search_scores_on_held_out_train_and_records_the_best(tiny_roberta, tiny_glue, recorded, monkeypatch):
    seen = []
    real = src.train.train

    def watch(model, method, train_split, eval_split, training, *args, **options):
        seen.append((train_split, eval_split, training))
        return real(model, method, train_split, eval_split, training, *args, **options)

    monkeypatch.setattr(src.train, "train", watch)
    settings = compose(
        "proposed-roberta-base-110M--CoLA-GLUE", tiny_roberta, tiny_glue, "run.optuna.n_trials=3",
        "run.fw_lora.warmup_steps=5", "run.optuna.search_space.warmup_steps.low=3",
        "run.optuna.search_space.warmup_steps.high=9", "run.optuna.search_space.warmup_steps.step=2",
        "run.optuna.train_examples=200",
    )  # fmt: skip
    run_training(settings)
    assert [len(split[0]) for split in seen] == [200, 200, 200, 300]
    assert [len(split[1]) for split in seen] == [30, 30, 30, 90]
    texts = [{split.tokens[a:b].tobytes() for a, b in itertools.pairwise(split.offsets)} for split in seen[0][:2]]
    everything = {seen[3][0].tokens[a:b].tobytes() for a, b in itertools.pairwise(seen[3][0].offsets)}
    assert texts[0].isdisjoint(texts[1]) and texts[0] | texts[1] <= everything
    assert [split[2].epochs for split in seen] == [1, 1, 1, 3]
    tracker = recorded[-1]
    best = tracker.config["search"]["best_values"]
    assert tracker.config["search"]["completed_trials"] == 3
    assert tracker.config["run"]["training"]["learning_rate"] == best["learning_rate"] == seen[-1][2].learning_rate
    assert tracker.config["run"]["fw_lora"]["warmup_steps"] == best["warmup_steps"]
    assert "lora_rank" in tracker.config["search"]["dropped_dimensions"]
    steps = [row for row in tracker.rows if "train_loss" in row]
    assert len(steps) == seen[-1][2].total_steps(300), "trials are not logged"
    assert tracker.summary[metrics.TIME_SEARCH_S] > 0


def test_head_alone(tiny_roberta, tiny_glue, recorded, caplog):
    _, tracker = full_run("baseline_lora", tiny_roberta, tiny_glue, recorded, "run.model.lora.enabled=false")
    assert "only the classification head is trained" in caplog.text
    assert tracker.summary[metrics.PARAMS_ADAPTER] == 0 and tracker.summary[metrics.MODULE_NAMES] == []
    assert tracker.summary[metrics.PARAMS_TRAINABLE] == tracker.summary[metrics.PARAMS_HEAD] > 0


def test_leading_rank(tiny_roberta, tiny_glue, recorded):
    arguments = ("run.model.budget_mode=rank", "run.model.lora.rank=3")
    _, tracker = full_run("baseline_lora", tiny_roberta, tiny_glue, recorded, *arguments)
    assert set(tracker.summary[metrics.MODULE_RANKS]) == {3}
    # Two layers of three 32 x 32 and two 32 x 64 projections.
    assert tracker.summary[metrics.PARAMS_ADAPTER] == 3 * 2 * (3 * 64 + 2 * 96)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run.fw_lora.warmup_steps=30"], "run.fw_lora.warmup_steps is 30, but the run has 30 optimizer steps"),
        (
            ["run.model.parameter_budget_percent=0.01"],
            r"run\.model\.parameter_budget_percent: 0\.01 % of .* use at least 0\.1887 %",
        ),
        (
            ["run.model.lora.target_modules=[qkv]"],
            "run.model.lora.target_modules: no weight matrix of .* matches 'qkv'",
        ),
        (["run.model.pretrained_id=no/such-model"], r"'no/such-model' cannot be fetched .* run\.model\.pretrained_id="),
        (["run.model.pretrained_id=package:no_such_package/model"], "'no_such_package' is not installed"),
        (["run.model.pretrained_id=package:fwlora/model"], "holds no config.json"),
        (
            ["run.dataset.max_length=600"],
            "max_length = 600: .* has positions for 138 tokens; use at most 138",
        ),
        (["run.dataset.eval_split=train"], "run.dataset.split and run.dataset.eval_split are both 'train'"),
        (["run.dataset.label_column=gold"], "has no column gold"),
    ],
)
def test_mistakes_are_found_before_any_weight_is_loaded(arguments, expected, tiny_roberta, tiny_glue, monkeypatch):
    monkeypatch.setattr(src.train, "build_model", lambda *args: pytest.fail("weights were loaded"))
    run_id = "proposed-roberta-base-110M--CoLA-GLUE"
    given = {item.partition("=")[0] for item in arguments}
    base = [
        f"run={run_id}", "mode=full", "wandb.mode=disabled", f"run.model.pretrained_id={tiny_roberta}",
        f"run.dataset.name={tiny_glue}", "run.model.parameter_budget_percent=5.0", "run.optuna.n_trials=0",
    ]  # fmt: skip
    kept = [item for item in base if item.partition("=")[0] not in given]
    with pytest.raises(UserError, match=expected):
        run_training(compose_settings([*kept, *arguments], CONFIG_DIR, {}))


def test_adalora_without_room_for_its_schedule(tiny_roberta, tiny_glue, recorded):
    with pytest.raises(UserError, match=r"tinit = 20 and tfinal = 10 of 30 optimizer steps leave AdaLoRA no steps"):
        full_run("adalora", tiny_roberta, tiny_glue, recorded, "run.adalora.tinit=20", "run.adalora.tfinal=10")
    assert not recorded, "found before the run is recorded"


@pytest.mark.parametrize("method", METHODS)
def test_a_diverging_run_is_recorded_as_failed(method, tiny_roberta, tiny_glue, recorded):
    with pytest.raises(UserError, match=r"(loss is|step \d+: `fisher` holds) .*; lower run\.training\.learning_rate"):
        full_run(method, tiny_roberta, tiny_glue, recorded, "run.training.learning_rate=1.0e+30")
    assert recorded[-1].exit_code == 1 and metrics.COMPLETED not in recorded[-1].summary


def test_a_schedule_that_cannot_be_made_names_its_settings(tiny_roberta, tiny_glue, recorded):
    options = ["run.training.lr_scheduler=cosine", "run.training.lr_scheduler_options={color: 1}"]
    expected = (
        r"run\.training\.lr_scheduler = cosine, run\.training\.lr_scheduler_options = \{'color': 1\} with .*color"
    )
    with pytest.raises(UserError, match=expected):
        full_run("baseline_lora", tiny_roberta, tiny_glue, recorded, *options)


def test_a_gpu_that_is_not_there_is_a_users_mistake(tiny_roberta, tiny_glue, recorded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine\.device = cuda: torch finds no GPU; use engine\.device=cpu or auto"):
        full_run("baseline_lora", tiny_roberta, tiny_glue, recorded, "engine.device=cuda")


def test_a_search_survives_a_trial_that_diverges(tiny_roberta, tiny_glue, recorded, caplog):
    settings = compose(
        "comparative-1-roberta-base-110M--CoLA-GLUE", tiny_roberta, tiny_glue, "run.optuna.n_trials=6",
        "run.optuna.train_examples=64",
    )  # fmt: skip
    space = {
        "learning_rate": Categorical(type="categorical", choices=[1e-3, 1e30]),
        "epochs": IntRange(type="int", low=1, high=2),
    }
    run = settings.run.model_copy(update={"optuna": settings.run.optuna.model_copy(update={"search_space": space})})
    run_training(settings.model_copy(update={"run": run}))
    found = recorded[-1].config["search"]
    assert found["infeasible_trials"] > 0 and found["best_values"]["learning_rate"] == 1e-3
    output = caplog.text
    assert "infeasible (the training loss is nan" in output or "infeasible (the evaluation loss is nan" in output
    assert "step 4/4  epoch 2" in output, "searched epochs are trained"


def test_a_trial_of_data_that_make_one_batch_takes_smaller_ones(tiny_roberta, tmp_path, caplog):
    frame = pd.DataFrame({"sentence": [f"the cat {i}" for i in range(10)], "label": [0, 1] * 5})
    for split in ("train", "validation"):
        frame.to_csv(tmp_path / f"{split}.csv", index=False)
    for run_id in ("proposed-roberta-base-110M--CoLA-GLUE", "comparative-2-roberta-base-110M--CoLA-GLUE"):
        run_training(compose(run_id, tiny_roberta, tmp_path, "run.dataset.subset=null", mode="trial"))
    assert caplog.text.count("step 2/2") == 2
