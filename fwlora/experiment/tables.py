"""Evaluated runs and cells as JSON documents and as tables for people."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fwlora.experiment import metrics
from fwlora.experiment.comparison import Cell, Group
from fwlora.experiment.evaluated_runs import EvaluatedRun, as_finite
from fwlora.experiment.statistics import confusion_matrix

_PACKED = (metrics.EVAL_PREDICTIONS, metrics.EVAL_LABELS)
_MODULE_LISTS = (
    metrics.MODULE_NAMES,
    metrics.MODULE_RANKS,
    metrics.MODULE_IMPORTANCES,
    metrics.MODULE_DELTA_NORMS,
)
_SIGNIFICANT_DIGITS = 6
_NOTHING = "-"


def to_json(document: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON with a line per top-level key: compact, and still readable in a diff. What is not finite is null."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(_without_non_finite(value), allow_nan=False, ensure_ascii=False)}"
        for key, value in document.items()
    ]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def describe_run(run: EvaluatedRun) -> dict[str, Any]:
    """The content of a run's ``metrics.json``: settings, summary, per-epoch values, confusion matrix, source."""
    config, summary = run.record.config, run.record.summary
    resolved = config.get("resolved") or {}
    kept = {key: value for key, value in sorted(summary.items()) if key not in (*_PACKED, *_MODULE_LISTS)}
    return {
        "run_id": run.run_id,
        "source": run.record.source,
        "primary_metric": metrics.eval_name(run.primary),
        "primary_value": run.values[metrics.eval_name(run.primary)],
        "settings": config["run"],
        "resolved": resolved,
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
    return {"run_id": run.run_id, "source": run.record.source, "history": [dict(row) for row in run.record.history]}


def epoch_rows(run: EvaluatedRun) -> list[dict[str, Any]]:
    """Rows that end an epoch, with step and epoch-level values."""
    rows = [row for row in run.record.history if as_finite(row.get(metrics.eval_name(run.primary))) is not None]
    step_only = (metrics.GRADIENT_NORM, metrics.FISHER_WARMUP, metrics.LEARNING_RATE, metrics.TRAIN_LOSS)
    return [{key: value for key, value in row.items() if key not in step_only} for row in rows]


def render_text_table(cells: Sequence[Cell]) -> str:
    """Aligned columns for a terminal, one row per method of a cell."""
    header, rows = _method_rows(cells)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        padded = (
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def render_markdown(cells: Sequence[Cell], statistics: Mapping[str, Any], warnings: Sequence[str]) -> str:
    """The table of methods, the table of paired differences and the warnings."""
    parts = ["# Comparison", _markdown_table(*_method_rows(cells))]
    if statistics["pairs"]:
        parts += ["## Paired differences (first minus second)", _markdown_table(*_pair_rows(statistics))]
        parts.append(
            f"Intervals: {statistics['confidence']:.0%} percentile bootstrap, {statistics['resamples']} resamples, "
            "over seeds and examples (examples alone for one seed). p-values: over seeds; Holm: over all pairs."
        )
    if warnings:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in warnings)]
    return "\n\n".join(parts) + "\n"


def render_csv(cells: Sequence[Cell]) -> str:
    """One row per method of a cell: seeds, and mean and standard deviation over seeds of every metric, in full."""
    names = list(dict.fromkeys(name for cell in cells for g in cell.groups for run in g.runs for name in run.values))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["cell", "method", "primary_metric", "n", "seeds", *(f"{n}_{s}" for n in names for s in ("mean", "sd"))]
    )
    for cell in cells:
        for group in cell.groups:
            seeds = " ".join(str(run.seed) for run in group.runs)
            values = [value for name in names for value in (group.mean(name), group.standard_deviation(name))]
            cells_of_row = [cell.name, group.label, cell.primary_eval_name, len(group.runs), seeds]
            writer.writerow([*cells_of_row, *("" if value is None else value for value in values)])
    return buffer.getvalue()


def format_p_value(value: float | None) -> str:
    """Three decimals, ``<0.001`` below."""
    return _NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _method_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    header = ["cell", "method", "n", "metric", "mean", "sd", "accuracy", "time [s]", "adapter parameters"]
    rows = [[cell.name, group.label, *_method_values(cell, group)] for cell in cells for group in cell.groups]
    return header, rows


def _method_values(cell: Cell, group: Group) -> list[str]:
    metric = cell.primary_eval_name
    start, final = group.mean(metrics.PARAMS_ADAPTER), group.mean(metrics.PARAMS_ADAPTER_FINAL)
    counts = dict.fromkeys(f"{count:.0f}" for count in (start, final) if count is not None)
    return [
        str(len(group.runs)),
        cell.primary,
        _number(group.mean(metric), 4),
        _number(group.standard_deviation(metric), 4),
        _number(group.mean("eval_accuracy"), 4),
        _number(group.mean(metrics.TRAINING_TIME_S), 1),
        " -> ".join(counts) or _NOTHING,
    ]


def _pair_rows(statistics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "cell",
        "first",
        "second",
        "metric",
        "seeds",
        "difference",
        "interval",
        "wins",
        "t p",
        "flip p",
        "t p (Holm)",
    ]
    adjusted = {(test["cell"], test["first"], test["second"]): test for test in statistics["holm"]["paired_t"]}
    rows = []
    for pair in statistics["pairs"]:
        names = [pair["cell"], pair["first"], pair["second"]]
        test = pair["over_seeds"].get(pair["primary_metric"])
        if test is None:
            rows.append([*names, pair["primary_metric"], "0", *[_NOTHING] * 6])
            continue
        holm = adjusted.get((names[0], names[1], names[2]), {}).get("p_value_holm")
        rows.append(
            [
                *names,
                pair["primary_metric"],
                str(test["count"]),
                f"{test['mean']:+.4f}",
                f"[{test['low']:+.4f}, {test['high']:+.4f}]",
                f"{test['wins']}/{test['count']}",
                *(format_p_value(value) for value in (test["t_p_value"], test["sign_flip_p_value"], holm)),
            ]
        )
    return header, rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _number(value: float | None, decimals: int) -> str:
    return _NOTHING if value is None else f"{value:.{decimals}f}"


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
