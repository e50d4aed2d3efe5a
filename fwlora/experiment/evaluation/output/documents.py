"""Results of an evaluation as JSON documents; they do not name the source of a run, so equal runs give equal bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fwlora.experiment.evaluation.claims.verdicts import ClaimResult, Finding, join_reasons
from fwlora.experiment.evaluation.compare.bootstrap import confusion_matrix
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.results import (
    Comparison,
    MeanDifference,
    PairComparison,
    PooledComparison,
    SeedComparison,
    TimeRatio,
)
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.json_types import JsonMapping, JsonObject, JsonValue
from fwlora.experiment.tracking import metrics, task_metrics

_PACKED = (metrics.EVAL_PREDICTIONS, metrics.EVAL_LABELS)
_MODULE_LISTS = (
    metrics.MODULE_NAMES,
    metrics.MODULE_RANKS,
    metrics.MODULE_IMPORTANCES,
    metrics.MODULE_DELTA_NORMS,
)
_SIGNIFICANT_DIGITS = 6


def to_json(document: JsonMapping) -> bytes:
    """Write UTF-8 JSON, a line per top-level key to keep diffs readable; numbers that are not finite are null."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(_without_non_finite(value), allow_nan=False, ensure_ascii=False)}"
        for key, value in document.items()
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def describe_run(run: EvaluatedRun) -> JsonObject:
    """Build a run's ``metrics.json``: settings, summary, epochs, confusion matrix (null for numbers), modules."""
    config, summary = run.record.config, run.record.summary
    kept = {key: value for key, value in sorted(summary.items()) if key not in (*_PACKED, *_MODULE_LISTS)}
    return {
        "run_id": run.run_id,
        "primary_metric": metrics.eval_name(run.primary),
        "primary_value": run.values[metrics.eval_name(run.primary)],
        "settings": config["run"],
        "resolved": run.record.resolved,
        "summary": {key: value for key, value in kept.items() if not key.startswith("_")},
        "epochs": epoch_rows(run),
        "confusion_matrix": _describe_confusion(run) if run.has_classes else None,
        "modules": {
            name.removeprefix("module_"): _round_floats(summary[name]) for name in _MODULE_LISTS if summary.get(name)
        },
    }


def _describe_confusion(run: EvaluatedRun) -> JsonObject:
    return {
        "label_names": list(run.label_names),
        "rows": "gold",
        "counts": confusion_matrix(run.labels, run.predictions, len(run.label_names)).tolist(),
    }


def describe_history(run: EvaluatedRun) -> JsonObject:
    """Build a run's ``history.json``: every logged row."""
    return {"run_id": run.run_id, "history": [dict(row) for row in run.record.history]}


def epoch_rows(run: EvaluatedRun) -> list[JsonObject]:
    """List the rows that end an epoch, without values of single steps."""
    rows = [row for row in run.record.history if as_finite(row.get(metrics.eval_name(run.primary))) is not None]
    step_only = (metrics.GRADIENT_NORM, metrics.FISHER_WARMUP, metrics.LEARNING_RATE, metrics.TRAIN_LOSS)
    return [{key: value for key, value in row.items() if key not in step_only} for row in rows]


def describe_comparison(comparison: Comparison, cells: Sequence[Cell]) -> JsonObject:
    """Build ``statistics.json``, which ``statistics.schema.json`` beside this file describes."""
    return {
        "difference": "first minus second, as fractions",
        "confidence": comparison.confidence,
        "level": comparison.level,
        "power": comparison.power,
        "resamples": comparison.resamples,
        "rng_seed": comparison.rng_seed,
        "cells": describe_cells(cells),
        "pooled": [_describe_pooled(entry) for entry in comparison.pooled],
        "pairs": [_describe_pair(pair) for pair in comparison.pairs],
        "holm": _describe_corrections(comparison),
    }


def describe_cells(cells: Sequence[Cell]) -> list[JsonObject]:
    """List means and standard deviations over seeds of every group, per cell."""
    return [
        {
            "cell": cell.name,
            "primary_metric": cell.primary_eval_name,
            "methods": [_describe_group(cell, group) for group in cell.groups],
        }
        for cell in cells
    ]


def _describe_group(cell: Cell, group: Group) -> JsonObject:
    metric = cell.primary_eval_name
    return {
        "method": group.label,
        "role": group.role,
        "run_ids": [run.run_id for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "n": len(group.runs),
        "mean": group.mean(metric),
        "sd": group.standard_deviation(metric),
        "accuracy_mean": group.mean(metrics.eval_name(task_metrics.ACCURACY)),
        "training_time_s_mean": group.mean(metrics.TRAINING_TIME_S),
        "training_time_s_sd": group.standard_deviation(metrics.TRAINING_TIME_S),
        "params_adapter": group.mean(metrics.PARAMS_ADAPTER),
        "params_adapter_final": group.mean(metrics.PARAMS_ADAPTER_FINAL),
        "constant_predictions": sum(bool(np.ptp(run.predictions) == 0) for run in group.runs),
    }


def _describe_pooled(entry: PooledComparison) -> JsonObject:
    return {
        "first": entry.first,
        "second": entry.second,
        "cells": list(entry.cells),
        "pairs": entry.pairs,
        "mean": entry.mean,
        "low": entry.low,
        "high": entry.high,
        "interval_over": entry.interval_over,
        "left_out": [str(reason) for reason in entry.left_out],
        "test": entry.test,
        "p_value": entry.p_value,
        "p_value_independent": entry.p_value_independent,
    }


def _describe_pair(pair: PairComparison) -> JsonObject:
    measured: JsonObject = {}
    if pair.training_time_ratio is not None:
        measured["improvement_rate"] = pair.improvement_rate
        measured["training_time_ratio"] = _describe_time_ratio(pair.training_time_ratio)
    return {
        "cell": pair.cell,
        "first": pair.first,
        "second": pair.second,
        "second_is": pair.second_is,
        "primary_metric": pair.primary_metric,
        "seeds": list(pair.seeds),
        "seed_level_test": pair.seed_level_test,
        **measured,
        "per_seed": [_describe_seed(seed) for seed in pair.per_seed],
        "over_seeds": {name: _describe_mean(difference) for name, difference in (pair.over_seeds or {}).items()},
    }


def _describe_time_ratio(time: TimeRatio) -> JsonObject:
    described = asdict(time)
    return described if time.reason else {key: value for key, value in described.items() if key != "reason"}


def _describe_mean(difference: MeanDifference) -> JsonObject:
    return {
        **asdict(difference.tests),
        "low": difference.low,
        "high": difference.high,
        "interval_over": difference.interval_over,
    }


def _describe_seed(seed: SeedComparison) -> JsonObject:
    return {
        "seed": seed.seed,
        "first_run_id": seed.first_run_id,
        "second_run_id": seed.second_run_id,
        "mcnemar": None if seed.mcnemar is None else asdict(seed.mcnemar),
        "bootstrap": {name: asdict(interval) for name, interval in seed.intervals.items()},
    }


def _describe_corrections(comparison: Comparison) -> dict[str, list[JsonObject]]:
    """List each family of tests with p-values before and after Holm's correction."""
    families: dict[str, list[JsonObject]] = {"headline": [], "paired_t": [], "sign_flip": [], "mcnemar": []}

    def note(family: str, names: JsonMapping, p_value: float | None, p_value_holm: float | None) -> None:
        if p_value is not None:
            families[family].append({**names, "p_value": p_value, "p_value_holm": p_value_holm})

    for entry in comparison.pooled:
        note("headline", {"first": entry.first, "second": entry.second}, entry.p_value, entry.p_value_holm)
    for pair in comparison.pairs:
        names = {"cell": pair.cell, "first": pair.first, "second": pair.second}
        if pair.primary is not None:
            tests = pair.primary.tests
            note("paired_t", names, tests.t_p_value, pair.t_p_value_holm)
            note("sign_flip", names, tests.sign_flip_p_value, pair.sign_flip_p_value_holm)
        for seed in pair.per_seed:
            p_value = None if seed.mcnemar is None else seed.mcnemar.p_value
            note("mcnemar", {**names, "seed": seed.seed}, p_value, seed.mcnemar_p_value_holm)
    return families


def describe_claim_results(results: Sequence[ClaimResult]) -> JsonObject:
    """Build ``claims.json``: per claim the verdict and its findings, whose values are points or ratios."""
    return {result.claim_id: _describe_claim_result(result) for result in results}


def _describe_claim_result(result: ClaimResult) -> JsonObject:
    claim = result.claim
    return {
        "verdict": result.verdict,
        "reason": join_reasons(result.reasons),
        "decided_by": join_reasons(result.remedies),
        "unit": claim.unit.name,
        "claim": claim.model_dump(exclude={"order"}, exclude_none=True),
        "findings": [_describe_finding(finding) for finding in result.findings],
    }


def _describe_finding(finding: Finding) -> JsonObject:
    described = {
        "cells": finding.cells,
        "seeds": finding.seeds,
        "verdict": finding.verdict,
        "value": finding.value,
        "low": finding.low,
        "high": finding.high,
        "interval_over": finding.interval_over,
        "test": finding.test,
        "p_value": finding.p_value,
        "p_value_holm": finding.p_value_holm,
        "reason": join_reasons(finding.reasons),
        "decided_by": join_reasons(finding.remedies),
        "left_out": [str(reason) for reason in finding.left_out],
        "caveat": finding.caveat,
    }
    return {key: value for key, value in described.items() if value is not None}


def _without_non_finite(value: JsonValue) -> JsonValue:
    if isinstance(value, Mapping):
        return {str(key): _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    if (isinstance(value, float) and not math.isfinite(value)) or value in ("NaN", "Infinity", "-Infinity"):
        return None
    return value


def _round_floats(values: Sequence[JsonValue]) -> list[JsonValue]:
    return [float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value for value in values]
