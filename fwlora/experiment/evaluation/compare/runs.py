"""Records of runs, checked and read into what a comparison needs. Nothing here reads a run's name."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.schema import SEARCHABLE
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.records import RunRecord, canonicalise, unpack_classes

_UNFINISHED = {
    "running": "is unfinished: it still runs, or its server lost sight of it; wait for it, or run it again",
    "failed": "is unfinished: it failed or was killed, as the end of its log may say; run it again",
    "crashed": "is unfinished: it crashed or was killed before its last epoch ended; run it again",
    "finished": "is unfinished: it ended before its last epoch was evaluated; run it again",
}
_IDENTITY = ("run_id", "training.seed")
COST_NAMES = (
    metrics.TRAINING_TIME_S,
    metrics.STEP_TIME_MEDIAN_S,
    metrics.TIME_SEARCH_S,
    metrics.PEAK_MEMORY_MIB,
    metrics.PARAMS_ADAPTER,
    metrics.PARAMS_ADAPTER_FINAL,
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A record that can be compared.

    Attributes:
        record: where it comes from.
        seed: ``training.seed``.
        method: as in the settings.
        settings: the run node flattened to dotted keys, without run id, seed and what a search replaced.
        cell_key: data set, model name, pretrained id and budget, as recorded.
        primary: the task metric that is compared, such as ``matthews_correlation``.
        values: final metrics by eval name (``eval_accuracy``), and costs; all finite.
        labels, predictions: classes of the eval split, shape ``(n,)``.
        label_names: one per class.
    """

    record: RunRecord
    seed: int
    method: str
    settings: Mapping[str, str]
    cell_key: tuple[str, str, str, str]
    primary: str
    values: Mapping[str, float]
    labels: np.ndarray
    predictions: np.ndarray
    label_names: tuple[str, ...]

    @property
    def run_id(self) -> str:
        return self.record.run_id


def as_finite(value: Any) -> float | None:
    """The number, or None for what is missing, text ("NaN" as W&B returns it), boolean or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def flatten_settings(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys to JSON text; null counts as absent, 1.0 as 1, the search space as one value."""
    flat: dict[str, str] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "optuna.search_space":
            flat.update(flatten_settings(value, f"{name}."))
        elif value is not None:
            flat[name] = json.dumps(canonicalise(value), sort_keys=True, ensure_ascii=False)
    return flat


def read_runs(records: Sequence[RunRecord]) -> list[EvaluatedRun]:
    """Check that every record can be compared, and read what comparison needs.

    Raises:
        UserError: names every run that is unfinished, lacks a value or has one that is not finite; every data
            set whose runs were evaluated on different examples or compare different metrics; runs that repeat a seed.
    """
    runs: list[EvaluatedRun] = []
    problems: list[str] = []
    for record in records:
        try:
            found = _find_problems(record)
            if not found:
                runs.append(_read_run(record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = [f"records what src.train does not write ({type(error).__name__}: {error}); leave it out"]
        problems.extend(f"run {record.run_id!r} {problem} (read from {record.source})" for problem in found)
    for data in sorted({run.cell_key[0] for run in runs}):
        problems.extend(_find_data_problems(data, [run for run in runs if run.cell_key[0] == data]))
    problems.extend(_find_repetitions(runs))
    if problems:
        raise UserError.collect("cannot evaluate, nothing was written", problems)
    return runs


def _primary_eval_name(record: RunRecord) -> str | None:
    return record.summary.get(metrics.PRIMARY_METRIC) or record.resolved.get(metrics.PRIMARY_METRIC)


def _find_problems(record: RunRecord) -> list[str]:
    run, summary = record.config.get("run"), record.summary
    if record.config and not isinstance(run, Mapping):
        return ["records no settings (config.run): src.train did not write it; leave it out"]
    if not record.finished or summary.get(metrics.COMPLETED) is not True:
        return [_UNFINISHED[record.state]]
    if not isinstance(run, Mapping):
        return ["records no settings (config.run): src.train did not write it; leave it out"]
    if run.get("run_id") not in (None, record.run_id):
        return [f"is the record of another run, {run.get('run_id')!r}; its folder or its W&B id was changed"]
    found = []
    for path in ("method", "dataset.name", "training.seed"):
        if path not in flatten_settings(run):
            found.append(f"does not record the setting {path}")
    primary = _primary_eval_name(record)
    known = [metrics.eval_name(name) for name in metrics.TASK_METRICS]
    if primary not in known:
        return [*found, f"has the primary metric {primary!r}; one of {known} is expected"]
    compared = (primary, "eval_accuracy", "eval_matthews_correlation")
    needed = [metrics.final_name(name) for name in dict.fromkeys(compared)]
    for name in (*needed, metrics.TRAINING_TIME_S):
        value, number = summary.get(name), as_finite(summary.get(name))
        if number is None:
            found.append(f"has no {name}" if value is None else f"has {name} = {value}, which is no finite number")
        elif name == metrics.TRAINING_TIME_S and number < 0:
            found.append(f"has {name} = {value}, which is no duration")
    for name in (primary, metrics.TRAIN_LOSS):
        if not any(as_finite(row.get(name)) is not None for row in record.history):
            found.append(f"has no {name} in its history")
    return found + _find_prediction_problems(record)


def _find_prediction_problems(record: RunRecord) -> list[str]:
    summary = record.summary
    names = (metrics.EVAL_FINGERPRINT, metrics.EVAL_LABELS, metrics.EVAL_PREDICTIONS)
    missing = [f"has no {name}" for name in names if not summary.get(name)]
    num_classes = len(record.resolved.get("label_names") or ())
    if num_classes < 2:
        missing.append("records no label names (config.resolved.label_names)")
    if missing:
        return missing
    try:
        labels, predictions = (unpack_classes(summary[name]) for name in names[1:])
    except (ValueError, KeyError, TypeError) as error:
        return [f"has predictions or labels that cannot be read: {error}"]
    if labels.size == 0 or labels.shape != predictions.shape:
        return [f"has {predictions.size} predictions for {labels.size} labels"]
    if max(labels.max(), predictions.max()) >= num_classes:
        return [f"has classes beyond its {num_classes} label names"]
    return []


def _read_run(record: RunRecord) -> EvaluatedRun:
    run, summary = record.config["run"], record.summary
    model, dataset, optuna = run.get("model") or {}, run["dataset"], run.get("optuna") or {}
    rank_leads = model.get("budget_mode") == "rank" or model.get("parameter_budget_percent") is None
    rank = (model.get("lora") or {}).get("rank")
    if rank_leads and optuna.get("n_trials") and "lora_rank" in (optuna.get("search_space") or {}):
        rank = "searched"
    budget = f"rank {rank}" if rank_leads else f"{float(model['parameter_budget_percent']):g} %"
    data = "/".join(str(part) for part in (dataset["name"], dataset.get("subset")) if part)
    pretrained = str(model.get("pretrained_id") or model.get("name"))
    task_values = {
        metrics.eval_name(name): metrics.final_name(metrics.eval_name(name)) for name in metrics.TASK_METRICS
    }
    recorded = {**task_values, **{name: name for name in COST_NAMES}, "eval_loss": metrics.final_name("eval_loss")}
    values = {name: as_finite(summary.get(source)) for name, source in recorded.items()}
    return EvaluatedRun(
        record=record,
        seed=_whole(run["training"]["seed"]),
        method=str(run["method"]),
        settings=_comparable_settings(run),
        cell_key=(data, str(model.get("name") or pretrained), pretrained, budget),
        primary=str(_primary_eval_name(record)).removeprefix(metrics.eval_name("")),
        values={name: value for name, value in values.items() if value is not None},
        labels=unpack_classes(summary[metrics.EVAL_LABELS]),
        predictions=unpack_classes(summary[metrics.EVAL_PREDICTIONS]),
        label_names=tuple(str(name) for name in record.resolved["label_names"]),
    )


def _whole(seed: Any) -> int:
    if int(seed) != seed:
        raise ValueError(f"training.seed is {seed!r}, which is no whole number")
    return int(seed)


def _comparable_settings(run: Mapping[str, Any]) -> dict[str, str]:
    settings = flatten_settings(run)
    optuna = run.get("optuna") or {}
    # What a search found is a result of the run, not a setting: it may differ between seeds of one group.
    names = set(optuna.get("search_space") or {}) if optuna.get("n_trials") else set()
    if settings.get("model.budget_mode") != '"rank"':
        names.discard("lora_rank")
    searched = {".".join(SEARCHABLE[name]) for name in names & SEARCHABLE.keys()}
    return {key: value for key, value in sorted(settings.items()) if key not in _IDENTITY and key not in searched}


def _find_data_problems(data: str, runs: Sequence[EvaluatedRun]) -> list[str]:
    """What keeps runs of one data set from being compared, or pooled, with each other."""
    found = []
    checks = {
        "were evaluated on different examples (eval_fingerprint)": lambda run: run.record.summary["eval_fingerprint"],
        "compare different primary metrics": lambda run: run.primary,
        "have different label names": lambda run: ",".join(run.label_names),
        "have different gold labels (checksum)": lambda run: zlib.crc32(run.labels.tobytes()),
    }
    for message, read in checks.items():
        if len({read(run) for run in runs}) > 1:
            found.append(f"{data}: runs {message}: " + ", ".join(f"{run.run_id} ({read(run)})" for run in runs))
    return found


def _find_repetitions(runs: Sequence[EvaluatedRun]) -> list[str]:
    same: dict[tuple[Any, ...], list[EvaluatedRun]] = {}
    for run in runs:
        same.setdefault((run.cell_key, tuple(run.settings.items()), run.seed), []).append(run)
    found = []
    for (key, _, _), alike in same.items():
        if len(alike) > 1:
            names = ", ".join(run.run_id for run in alike)
            cell = name_cell(key, with_pretrained_id=False)
            found.append(f"{cell}: runs {names} record the same settings and the same seed; pass one of them")
    return found


def name_cell(key: tuple[str, str, str, str], with_pretrained_id: bool) -> str:
    """``glue/cola, roberta-base, 0.2 %``."""
    data, model, pretrained, budget = key
    return ", ".join((data, pretrained if with_pretrained_id else model, budget))
