"""What evaluation found as JSON documents. They say nothing of where a run was read: equal runs give equal bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fwlora.experiment.evaluation.claims.verdicts import Answer
from fwlora.experiment.evaluation.compare.bootstrap import confusion_matrix
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.tracking import metrics

_PACKED = (metrics.EVAL_PREDICTIONS, metrics.EVAL_LABELS)
_MODULE_LISTS = (
    metrics.MODULE_NAMES,
    metrics.MODULE_RANKS,
    metrics.MODULE_IMPORTANCES,
    metrics.MODULE_DELTA_NORMS,
)
_SIGNIFICANT_DIGITS = 6


def to_json(document: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON with a line per top-level key: compact, and still readable in a diff. What is not finite is null."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(_without_non_finite(value), allow_nan=False, ensure_ascii=False)}"
        for key, value in document.items()
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def describe_run(run: EvaluatedRun) -> dict[str, Any]:
    """The content of a run's ``metrics.json``: settings, summary, per-epoch values, confusion matrix, modules."""
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
        "confusion_matrix": {
            "label_names": list(run.label_names),
            "rows": "gold",
            "counts": confusion_matrix(run.labels, run.predictions, len(run.label_names)).tolist(),
        },
        "modules": {
            name.removeprefix("module_"): _round_floats(summary[name]) for name in _MODULE_LISTS if summary.get(name)
        },
    }


def describe_history(run: EvaluatedRun) -> dict[str, Any]:
    """The content of a run's ``history.json``: every logged row."""
    return {"run_id": run.run_id, "history": [dict(row) for row in run.record.history]}


def epoch_rows(run: EvaluatedRun) -> list[dict[str, Any]]:
    """Rows that end an epoch, with step and epoch-level values."""
    rows = [row for row in run.record.history if as_finite(row.get(metrics.eval_name(run.primary))) is not None]
    step_only = (metrics.GRADIENT_NORM, metrics.FISHER_WARMUP, metrics.LEARNING_RATE, metrics.TRAIN_LOSS)
    return [{key: value for key, value in row.items() if key not in step_only} for row in rows]


def describe_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """The content of ``claims.json``: per claim the verdict and what it rests on; values are points, or ratios."""
    return {answer.claim_id: _describe_answer(answer) for answer in answers}


def _describe_answer(answer: Answer) -> dict[str, Any]:
    claim = answer.claim
    stated = claim.model_dump(exclude={"order"}, exclude_none=True)
    findings = [{key: value for key, value in asdict(each).items() if value is not None} for each in answer.findings]
    return {
        "verdict": answer.verdict,
        "reason": answer.reason,
        "decided_by": answer.decided_by,
        "unit": "ratio" if claim.is_ratio else "points",
        "claim": stated,
        "findings": findings,
    }


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    if (isinstance(value, float) and not math.isfinite(value)) or value in ("NaN", "Infinity", "-Infinity"):
        return None
    return value


def _round_floats(values: Sequence[Any]) -> list[Any]:
    return [float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value for value in values]
