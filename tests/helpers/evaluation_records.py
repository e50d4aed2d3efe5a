"""Made-up but complete run records for the tests of evaluation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from fwlora.experiment.data.glue import find_task_metric
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.metrics import eval_name, final_name
from fwlora.experiment.tracking.records import RunRecord, pack_values
from fwlora.experiment.tracking.task_metrics import TASK_METRICS, compute_task_metrics

STEPS_PER_EPOCH = 20
EPOCHS = 3


def make_settings(run_id: str, method: str, seed: int, subset: str = "sst2", budget: float = 0.2) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "run_id": run_id,
        "method": method,
        "model": {
            "name": "roberta-base",
            "pretrained_id": "roberta-base",
            "parameter_budget_percent": budget,
            "budget_mode": "budget",
            "lora": {"rank": 8, "alpha": 16, "target_modules": ["query", "value"]},
        },
        "dataset": {"name": "glue", "subset": subset, "max_length": 128},
        "training": {"epochs": EPOCHS, "batch_size": 32, "learning_rate": 2e-4, "seed": seed},
        "optuna": {"n_trials": 0, "search_space": {}},
    }
    if method == "proposed_fw_lora":
        settings["fw_lora"] = {"lambda_fw": 1e-4, "warmup_steps": 10, "fisher_alpha": 0.98, "importance": "sum"}
    return settings


def make_labels(count: int = 400, classes: int = 2) -> np.ndarray:
    """Gold classes, or with ``classes`` 1 gold numbers from 0 to 5 with a digit behind the point."""
    if classes == 1:
        return (np.random.default_rng(99).integers(0, 51, count) / 10).astype(np.float32)
    return np.random.default_rng(99).integers(0, classes, count)


def make_record(
    run_id: str,
    method: str = "baseline_lora",
    seed: int = 1,
    error_rate: float = 0.1,
    subset: str = "sst2",
    budget: float = 0.2,
    classes: int = 2,
    count: int = 400,
    time_s: float = 100.0,
    modules: bool = False,
) -> RunRecord:
    """A finished run whose predictions are wrong at about ``error_rate``; metrics follow from the predictions.

    The subset ``stsb`` has numbers, whose errors have ten times that standard deviation.
    """
    rng = np.random.default_rng([seed, len(run_id), sum(map(ord, run_id))])
    classes = 1 if TASK_METRICS[find_task_metric(subset)].predicts == "numbers" else classes
    labels = make_labels(count, classes)
    wrong = rng.random(count) < error_rate
    if classes == 1:
        predictions = (labels + rng.normal(0, 10 * error_rate, count)).astype(np.float32)
    else:
        predictions = np.where(wrong, (labels + 1) % classes, labels)
    task = compute_task_metrics(labels, predictions, classes)
    primary = eval_name(find_task_metric(subset))
    summary: dict[str, Any] = {
        metrics.COMPLETED: True,
        metrics.PRIMARY_METRIC: primary,
        **{final_name(eval_name(name)): value for name, value in task.items()},
        metrics.TRAINING_TIME_S: time_s + seed,
        metrics.TOTAL_STEPS: EPOCHS * STEPS_PER_EPOCH,
        metrics.PARAMS_ADAPTER: 248000,
        metrics.PARAMS_ADAPTER_FINAL: 248000,
        metrics.EVAL_PREDICTIONS: pack_values(predictions, classes),
        metrics.EVAL_LABELS: pack_values(labels, classes),
        metrics.EVAL_FINGERPRINT: f"fingerprint-{subset}-{count}",
    }
    if modules:
        places = [(layer, kind) for layer in range(12) for kind in PROJECTIONS if (layer, kind) != (3, PROJECTIONS[3])]
        summary[metrics.MODULE_NAMES] = [f"roberta.encoder.layer.{layer}.{kind}" for layer, kind in places]
        summary[metrics.MODULE_RANKS] = [1] * len(places)
        summary[metrics.MODULE_DELTA_NORMS] = [float(value) for value in rng.gamma(2.0, 0.1, len(places))]
        importances = rng.dirichlet(np.ones(len(places)) * 0.3)
        summary[metrics.MODULE_IMPORTANCES] = (
            [float(value) for value in importances] if method.startswith("proposed") else None
        )
    return RunRecord(
        run_id=run_id,
        config={
            "run": make_settings(run_id, method, seed, subset, budget),
            "resolved": {
                "task": subset,
                "label_names": ["negative", "positive", "neutral", "mixed"][: classes if classes > 1 else 0],
                "precision": "bf16",
            },
        },
        summary=summary,
        history=_make_history(rng, primary, summary[final_name(primary)], method.startswith("proposed")),
        state="finished",
        source=f"results/{run_id}/wandb",
    )


PROJECTIONS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "intermediate.dense",
    "output.dense",
)


def _make_history(rng: np.random.Generator, primary: str, final: float, warmup: bool) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1):
        row: dict[str, Any] = {
            metrics.GLOBAL_STEP: step,
            metrics.EPOCH: step / STEPS_PER_EPOCH,
            metrics.TRAIN_LOSS: 0.7 * float(np.exp(-step / 20)) + 0.05 * float(rng.random()),
            metrics.LEARNING_RATE: 2e-4,
        }
        if warmup:
            row[metrics.FISHER_WARMUP] = int(step <= 10)
        if step % STEPS_PER_EPOCH == 0:
            epoch = step // STEPS_PER_EPOCH
            row[metrics.EVAL_LOSS] = 0.3 + 0.05 * abs(epoch - 2)
            row[primary] = final + (0.0, -0.05, 0.01, 0.0)[epoch]
            row[metrics.TRAIN_EPOCH_ACCURACY] = 0.8 + 0.04 * epoch
        rows.append(row)
    return rows


def change(record: RunRecord, **paths: Any) -> RunRecord:
    """A copy with other values: ``summary__x=1`` sets summary["x"], ``config__run__a=2`` goes deeper, None deletes."""
    fields = {name: copy.deepcopy(getattr(record, name)) for name in RunRecord.__dataclass_fields__}
    for path, value in paths.items():
        *parents, name = path.split("__")
        node = fields
        for parent in parents:
            node = node[parent]
        if value is None:
            node.pop(name, None)
        else:
            node[name] = value
    return RunRecord(**fields)
