"""What makes a comparison unequal, or its numbers doubtful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fwlora.experiment import metrics
from fwlora.experiment.evaluation.cells import Cell, Group, shorten_setting
from fwlora.experiment.evaluation.runs import EvaluatedRun, as_finite

_METHOD_SETTINGS = ("method", "fw_lora.", "adalora.")
_SETTING_KINDS = {"optuna": "search", "dataset": "data", "training": "training settings", "model": "model settings"}
_LEAST_BUDGET_SHARE = 0.95


def find_warnings(cells: Sequence[Cell]) -> list[str]:
    """What makes a comparison unequal or its numbers doubtful, one sentence each."""
    found: list[str] = []
    for cell in cells:
        problems = find_unequal_settings(cell.groups) + _find_unequal_facts(cell) + _find_unequal_seeds(cell)
        problems += [problem for run in cell.runs for problem in _find_doubts(run)]
        found.extend(f"{cell.name}: {problem}" for problem in problems)
    return found


def find_unequal_settings(groups: Sequence[Group]) -> list[str]:
    """Settings, other than the method's own, in which groups of a cell differ, one sentence each."""
    settings = [group.settings for group in groups]
    searches = any(int(json.loads(each.get("optuna.n_trials", "0"))) > 0 for each in settings)
    found = []
    for key in sorted({key for each in settings for key in each}):
        kind = _SETTING_KINDS.get(key.split(".", 1)[0])
        if key.startswith(_METHOD_SETTINGS) or (kind == "search" and not searches):
            continue
        if len({each.get(key) for each in settings}) > 1:
            values = (f"{shorten_setting(group.settings.get(key))} for {group.label}" for group in groups)
            found.append(f"unequal {kind or 'settings'}: {key} is {', '.join(values)}")
    return found


def _find_unequal_facts(cell: Cell) -> list[str]:
    """Compare what the program found out while running, where settings alone do not decide it."""
    runs = cell.runs
    facts = {run.run_id: _read_facts(run) for run in runs}
    found = []
    for name in dict.fromkeys(name for read in facts.values() for name in read):
        by_value: dict[str, list[str]] = {}
        for run_id, read in facts.items():
            by_value.setdefault(str(read.get(name)), []).append(run_id)
        if len(by_value) > 1:
            shares = (f"{value} for {_name_some(run_ids)}" for value, run_ids in by_value.items())
            found.append(f"unequal {name}: {', '.join(shares)}")
    return found


def _read_facts(run: EvaluatedRun) -> dict[str, Any]:
    config, summary = run.record.config, run.record.summary
    resolved = config.get("resolved") or {}
    environment = resolved.get("environment") or {}
    return {
        "precision": resolved.get("precision"),
        **{f"data ({key})": value for key, value in sorted(resolved.items()) if "fingerprint" in key},
        "steps": summary.get(metrics.TOTAL_STEPS),
        "encoder weights": summary.get(metrics.ENCODER_FINGERPRINT),
        "engine (fast)": (config.get("engine") or {}).get("fast"),
        "hardware": environment.get("device"),
        "threads": environment.get("threads"),
        "commit": environment.get("commit"),
        **{f"version of {name}": version for name, version in sorted((environment.get("packages") or {}).items())},
    }


def _name_some(run_ids: Sequence[str]) -> str:
    return run_ids[0] if len(run_ids) == 1 else f"{run_ids[0]} and {len(run_ids) - 1} more"


def _find_unequal_seeds(cell: Cell) -> list[str]:
    found = []
    for first, second in cell.pairs():
        ours, theirs = ({run.seed for run in group.runs} for group in (first, second))
        if ours != theirs:
            found.append(
                f"unequal seeds: {sorted(ours)} for {first.label}, {sorted(theirs)} for {second.label}; "
                f"{len(ours & theirs)} can be paired"
            )
    return found


def _find_doubts(run: EvaluatedRun) -> list[str]:
    found = []
    recorded, recomputed = run.values["eval_accuracy"], float(np.mean(run.labels == run.predictions))
    if abs(recomputed - recorded) > 1e-4:
        found.append(f"run {run.run_id} records accuracy {recorded:.4f}, its predictions give {recomputed:.4f}")
    if np.ptp(run.predictions) == 0:
        found.append(f"run {run.run_id} predicts one class for every example (counted, not dropped)")
    summary = run.record.summary
    budget, used = as_finite(summary.get(metrics.BUDGET_PARAMETERS)), run.values.get(metrics.PARAMS_ADAPTER_FINAL)
    if budget and used is not None and (used > budget or used < _LEAST_BUDGET_SHARE * budget):
        share = f"{100 * used / budget:.0f} % of its budget of {budget:.0f}"
        found.append(f"run {run.run_id} uses {used:.0f} adapter parameters, {share}")
    return found
