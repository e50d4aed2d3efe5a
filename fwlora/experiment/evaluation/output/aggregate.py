"""``aggregated_metrics.json`` for pipelines: values of every run, the best run of each side, and their gap."""

from __future__ import annotations

from collections.abc import Sequence

from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.comparisons import improvement_rate
from fwlora.experiment.evaluation.compare.results import ComparisonWarning
from fwlora.experiment.evaluation.compare.runs import COST_NAMES
from fwlora.experiment.json_types import JsonObject
from fwlora.experiment.tracking import metrics, task_metrics

_BEST_KEYS = ("best_proposed", "best_baseline", "gap", "improvement_rate")


def aggregate(cells: Sequence[Cell], warnings: Sequence[ComparisonWarning]) -> JsonObject:
    """Build ``aggregated_metrics.json``.

    ``best_*`` is the highest final primary metric of a single run, the control counted among the baselines; ``gap`` is
    their difference, ``improvement_rate`` is ``(proposed - baseline) / baseline``, null where the baseline is not
    positive. All four are null over several cells, which cannot be compared with each other; ``cells`` has them one by
    one.
    """
    runs = sorted((run for cell in cells for run in cell.runs), key=lambda run: run.run_id)
    order = (*map(metrics.eval_name, task_metrics.TASK_METRICS), metrics.EVAL_LOSS, *COST_NAMES)
    names = [name for name in order if any(name in run.values for run in runs)]
    primaries = list(dict.fromkeys(cell.primary_eval_name for cell in cells))
    top = _describe_best(cells[0]) if len(cells) == 1 else dict.fromkeys(_BEST_KEYS)
    if len(cells) > 1:
        top["reason"] = f"{len(cells)} cells (data set, model, budget) are not comparable with each other: see cells"
    return {
        "primary_metric": primaries[0] if len(primaries) == 1 else None,
        "metrics": {name: {run.run_id: run.values[name] for run in runs if name in run.values} for name in names},
        **top,
        "cells": [
            {"cell": cell.name, "primary_metric": cell.primary_eval_name, **_describe_best(cell)} for cell in cells
        ],
        "warnings": [str(warning) for warning in warnings],
    }


def _describe_best(cell: Cell) -> JsonObject:
    best: list[JsonObject | None] = []
    for wanted in (True, False):
        runs = [run for group in cell.groups if group.is_proposed is wanted for run in group.runs]
        run = min(runs, key=lambda run: (-cell.read(run), run.run_id), default=None)
        best.append({"run_id": run.run_id, "value": cell.read(run)} if run else None)
    described: JsonObject = dict(zip(_BEST_KEYS, (*best, None, None), strict=True))
    if best[0] and best[1]:
        described["gap"] = best[0]["value"] - best[1]["value"]
        described["improvement_rate"] = improvement_rate(best[0]["value"], best[1]["value"])
        if described["improvement_rate"] is None:
            described["reason"] = "improvement_rate is null: the baseline is not positive"
    else:
        described["reason"] = f"no {'baseline' if best[0] else 'proposed'} run to compare with"
    return described
