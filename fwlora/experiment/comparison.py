"""Checked runs to cells of comparable groups, their aggregates, and the paired statistics between their methods.

A *cell* is what methods are compared in: one data set, one backbone, one parameter budget. A *group* is the runs of a
cell that record the same settings but for the seed. Nothing here reads a run's name.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fwlora.experiment import metrics, statistics
from fwlora.experiment.evaluated_runs import EvaluatedRun, as_finite, name_cell

METHOD_NAMES = {"baseline_lora": "LoRA", "adalora": "AdaLoRA", "proposed_fw_lora": "FW-LoRA"}
IMPORTANCE_SETTING = "fw_lora.importance"
NO_SEED_TEST = "no seed-level test possible: one paired seed"
NO_PAIR = "no seed-level test possible: no seed was run with both methods"
_METHOD_SETTINGS = ("method", "fw_lora.", "adalora.")
_SETTING_KINDS = {"optuna": "search", "dataset": "data", "training": "training settings", "model": "model settings"}
_LONGEST_VALUE_IN_LABEL = 24
_LEAST_BUDGET_SHARE = 0.95


@dataclass(frozen=True)
class Group:
    """Runs with equal settings, ascending in seed."""

    label: str
    method: str
    runs: tuple[EvaluatedRun, ...]

    @property
    def is_proposed(self) -> bool:
        return self.method.startswith("proposed")

    @property
    def is_control(self) -> bool:
        """Uniform shrinkage: the proposed method without its Fisher weighting."""
        return self.is_proposed and self.runs[0].settings.get(IMPORTANCE_SETTING) == '"none"'

    def values(self, metric: str) -> list[float]:
        """One value per run that recorded the metric, in order of seed."""
        return [run.values[metric] for run in self.runs if metric in run.values]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return float(np.mean(values)) if values else None

    def standard_deviation(self, metric: str) -> float | None:
        """Over seeds, with n - 1; None for fewer than two."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Cell:
    """Comparable groups: baselines first. ``condition`` is the name as part of a file name."""

    name: str
    condition: str
    primary: str
    groups: tuple[Group, ...]

    @property
    def primary_eval_name(self) -> str:
        return metrics.eval_name(self.primary)

    def read(self, run: EvaluatedRun) -> float:
        """The compared value of a run."""
        return run.values[self.primary_eval_name]

    def pairs(self) -> Iterator[tuple[Group, Group]]:
        """Each proposed group with each baseline, then with each uniform-shrinkage control that it is not."""
        proposed = [group for group in self.groups if group.is_proposed]
        for first in proposed:
            yield from ((first, other) for other in self.groups if not other.is_proposed)
            if not first.is_control:
                yield from ((first, other) for other in proposed if other.is_control)


def group_cells(runs: Sequence[EvaluatedRun]) -> list[Cell]:
    """Cells in order of data set, model and budget, each with its groups; independent of the order of ``runs``."""
    keys = sorted({run.cell_key for run in runs}, key=lambda key: (*key[:3], _budget_order(key[3]), key[3]))
    plain = [name_cell(key, with_pretrained_id=False) for key in keys]
    cells: list[Cell] = []
    for key, name in zip(keys, plain, strict=True):
        name = name if plain.count(name) == 1 else name_cell(key, with_pretrained_id=True)
        members = [run for run in runs if run.cell_key == key]
        condition = re.sub(r"[^A-Za-z0-9.]+", "-", name.replace(" %", "pct")).strip("-.")
        taken = sum(cell.condition == condition for cell in cells)
        condition = f"{condition}-{taken + 1}" if taken else condition
        cells.append(Cell(name, condition, members[0].primary, _group_runs(members)))
    return cells


def find_warnings(cells: Sequence[Cell]) -> list[str]:
    """What makes a comparison unequal or its numbers doubtful, one sentence each."""
    found: list[str] = []
    for cell in cells:
        problems = _find_unequal_settings(cell) + _find_unequal_facts(cell) + _find_unequal_seeds(cell)
        problems += [problem for group in cell.groups for run in group.runs for problem in _find_doubts(run)]
        best = _describe_best(cell)["best_proposed"]
        if best and any(
            best["run_id"] == run.run_id for group in cell.groups if group.is_control for run in group.runs
        ):
            problems.append(f"best_proposed {best['run_id']} is the uniform-shrinkage control, not Fisher weighting")
        found.extend(f"{cell.name}: {problem}" for problem in problems)
    return found


def aggregate(cells: Sequence[Cell], warnings: Sequence[str]) -> dict[str, Any]:
    """The content of ``aggregated_metrics.json``.

    ``best_*`` is the highest final primary metric of a single run; ``cells`` hold the means over seeds.
    ``improvement_rate`` is ``(proposed - baseline) / baseline``, null where the baseline is not positive.
    """
    runs = sorted((run for cell in cells for group in cell.groups for run in group.runs), key=lambda run: run.run_id)
    names = [name for name in _METRIC_ORDER if any(name in run.values for run in runs)]
    described = [_describe_cell(cell) for cell in cells]
    primaries = list(dict.fromkeys(cell.primary_eval_name for cell in cells))
    top = _describe_best(cells[0]) if len(cells) == 1 else dict.fromkeys(_BEST_KEYS)
    if len(cells) > 1:
        top["reason"] = f"{len(cells)} cells (data set, model, budget) are not comparable with each other: see cells"
    return {
        "primary_metric": primaries[0] if len(primaries) == 1 else None,
        "metrics": {name: {run.run_id: run.values[name] for run in runs if name in run.values} for name in names},
        **top,
        "cells": described,
        "warnings": list(warnings),
    }


def compare_pairs(cells: Sequence[Cell], rng_seed: int, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """Every paired test and interval, as plain data (the content of ``statistics.json``).

    The Generator of a pair is seeded by ``rng_seed`` and the pair's name, so its interval does not depend on which
    other runs are evaluated. Holm's correction runs over each family: one test, on the primary metric, over all pairs
    of all cells (McNemar, on accuracy: over all pairs and seeds).
    """
    pairs = [_compare_pair(cell, *pair, rng_seed, resamples) for cell in cells for pair in cell.pairs()]
    return {
        "difference": "first minus second, as fractions",
        "confidence": statistics.CONFIDENCE,
        "resamples": resamples,
        "rng_seed": rng_seed,
        "pairs": pairs,
        "holm": _correct_families(pairs),
    }


_BEST_KEYS = ("best_proposed", "best_baseline", "gap", "improvement_rate")
_METRIC_ORDER = (
    *(metrics.eval_name(name) for name in metrics.TASK_METRICS),
    metrics.EVAL_LOSS,
    metrics.TRAINING_TIME_S,
    metrics.STEP_TIME_MEDIAN_S,
    metrics.TIME_SEARCH_S,
    metrics.PEAK_MEMORY_MIB,
    metrics.PARAMS_ADAPTER,
    metrics.PARAMS_ADAPTER_FINAL,
)


def improvement_rate(proposed: float, baseline: float) -> float | None:
    """``(proposed - baseline) / baseline``; None where the baseline is not positive and a rate means nothing."""
    return (proposed - baseline) / baseline if baseline > 0 else None


def _describe_best(cell: Cell) -> dict[str, Any]:
    best: list[dict[str, Any] | None] = []
    for wanted in (True, False):
        runs = [run for group in cell.groups if group.is_proposed is wanted for run in group.runs]
        run = min(runs, key=lambda run: (-cell.read(run), run.run_id), default=None)
        best.append({"run_id": run.run_id, "value": cell.read(run)} if run else None)
    described: dict[str, Any] = dict(zip(_BEST_KEYS, (*best, None, None), strict=True))
    if best[0] and best[1]:
        described["gap"] = best[0]["value"] - best[1]["value"]
        described["improvement_rate"] = improvement_rate(best[0]["value"], best[1]["value"])
        if described["improvement_rate"] is None:
            described["reason"] = "improvement_rate is null: the baseline is not positive"
    else:
        described["reason"] = f"no {'baseline' if best[0] else 'proposed'} run to compare with"
    return described


def _describe_cell(cell: Cell) -> dict[str, Any]:
    metric = cell.primary_eval_name
    methods = [
        {
            "method": group.label,
            "run_ids": [run.run_id for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "n": len(group.runs),
            "mean": group.mean(metric),
            "sd": group.standard_deviation(metric),
            "accuracy_mean": group.mean("eval_accuracy"),
            "training_time_s_mean": group.mean(metrics.TRAINING_TIME_S),
            "params_adapter": group.mean(metrics.PARAMS_ADAPTER),
            "params_adapter_final": group.mean(metrics.PARAMS_ADAPTER_FINAL),
            "constant_predictions": sum(bool(np.ptp(run.predictions) == 0) for run in group.runs),
        }
        for group in cell.groups
    ]
    differences = []
    for first, second in cell.pairs():
        ours, theirs = (float(np.mean(group.values(metric))) for group in (first, second))
        times = [float(np.mean(group.values(metrics.TRAINING_TIME_S))) for group in (first, second)]
        differences.append(
            {
                "proposed": first.label,
                "baseline": second.label,
                "difference": ours - theirs,
                "improvement_rate": improvement_rate(ours, theirs),
                "training_time_ratio": times[0] / times[1] if times[1] > 0 else None,
            }
        )
    description = {"cell": cell.name, "primary_metric": metric, **_describe_best(cell)}
    return {**description, "methods": methods, "differences": differences}


def _compare_pair(cell: Cell, first: Group, second: Group, rng_seed: int, resamples: int) -> dict[str, Any]:
    by_seed = [{run.seed: run for run in group.runs} for group in (first, second)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    described: dict[str, Any] = {
        "cell": cell.name,
        "first": first.label,
        "second": second.label,
        "second_is": "control" if second.is_control else "baseline",
        "primary_metric": cell.primary,
        "seeds": seeds,
        "seed_level_test": "paired t and exact sign-flip permutation" if len(seeds) > 1 else NO_SEED_TEST,
    }
    if not seeds:
        return {**described, "seed_level_test": NO_PAIR, "per_seed": [], "over_seeds": {}}
    names = list(dict.fromkeys((cell.primary, "accuracy", "matthews_correlation")))
    runs = [(by_seed[0][seed], by_seed[1][seed]) for seed in seeds]
    rng = np.random.default_rng([rng_seed, zlib.crc32("|".join((cell.name, first.label, second.label)).encode())])
    described["per_seed"] = [_compare_runs(*pair, names, rng, resamples) for pair in runs]
    ours, theirs = (np.stack([pair[side].predictions for pair in runs]) for side in (0, 1))
    labels, num_classes = runs[0][0].labels, len(runs[0][0].label_names)
    intervals = statistics.paired_bootstrap(labels, ours, theirs, names, num_classes, rng, resamples)
    described["over_seeds"] = {
        name: {
            **asdict(statistics.compare_seeds(_seed_differences(described["per_seed"], name), rng)),
            "low": intervals[name].low,
            "high": intervals[name].high,
            "interval_over": "seeds and examples" if len(seeds) > 1 else "examples",
        }
        for name in names
    }
    return described


def _seed_differences(per_seed: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
    return np.array([seed["bootstrap"][metric]["difference"] for seed in per_seed])


def _compare_runs(
    ours: EvaluatedRun, theirs: EvaluatedRun, names: Sequence[str], rng: np.random.Generator, resamples: int
) -> dict[str, Any]:
    labels, first, second = ours.labels, ours.predictions, theirs.predictions
    intervals = statistics.paired_bootstrap(labels, first, second, names, len(ours.label_names), rng, resamples)
    return {
        "seed": ours.seed,
        "first_run_id": ours.run_id,
        "second_run_id": theirs.run_id,
        "mcnemar": asdict(statistics.mcnemar_exact(labels, first, second)),
        "bootstrap": {name: asdict(interval) for name, interval in intervals.items()},
    }


def _correct_families(pairs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    families: dict[str, list[dict[str, Any]]] = {"paired_t": [], "sign_flip": [], "mcnemar": []}
    for pair in pairs:
        names = {key: pair[key] for key in ("cell", "first", "second")}
        over_seeds = pair["over_seeds"].get(pair["primary_metric"], {})
        for family, key in (("paired_t", "t_p_value"), ("sign_flip", "sign_flip_p_value")):
            if over_seeds.get(key) is not None:
                families[family].append({**names, "p_value": over_seeds[key]})
        for seed in pair["per_seed"]:
            families["mcnemar"].append({**names, "seed": seed["seed"], "p_value": seed["mcnemar"]["p_value"]})
    for tests in families.values():
        adjusted = statistics.holm_adjust([test["p_value"] for test in tests])
        for test, p_value in zip(tests, adjusted, strict=True):
            test["p_value_holm"] = p_value
    return families


def _find_unequal_settings(cell: Cell) -> list[str]:
    settings = [group.runs[0].settings for group in cell.groups]
    searches = any(int(json.loads(each.get("optuna.n_trials", "0"))) > 0 for each in settings)
    found = []
    for key in sorted({key for each in settings for key in each}):
        kind = _SETTING_KINDS.get(key.split(".", 1)[0])
        if key.startswith(_METHOD_SETTINGS) or (kind == "search" and not searches):
            continue
        if len({each.get(key) for each in settings}) > 1:
            values = (f"{_shorten(each.get(key))} for {g.label}" for g, each in zip(cell.groups, settings, strict=True))
            found.append(f"unequal {kind or 'settings'}: {key} is {', '.join(values)}")
    return found


def _find_unequal_facts(cell: Cell) -> list[str]:
    """Compare what the program found out while running, where settings alone do not decide it."""
    runs = [run for group in cell.groups for run in group.runs]
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


def _budget_order(budget: str) -> float:
    return float(re.sub(r"[^0-9.]", "", budget) or 0)


def _group_runs(runs: Sequence[EvaluatedRun]) -> tuple[Group, ...]:
    by_settings: dict[tuple[Any, ...], list[EvaluatedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_settings.setdefault(tuple(run.settings.items()), []).append(run)
    groups = []
    for members in by_settings.values():
        method = members[0].method
        variants = [dict(settings) for settings in by_settings if dict(settings).get("method") == json.dumps(method)]
        differing = sorted(
            key for key in {key for settings in variants for key in settings} if len({v.get(key) for v in variants}) > 1
        )
        parts = [f"{key}={_shorten(members[0].settings.get(key))}" for key in differing]
        label = METHOD_NAMES.get(method, method) + (f" ({', '.join(parts)})" if parts else "")
        groups.append(Group(label, method, tuple(members)))
    order = list(METHOD_NAMES)
    rank = {method: position for position, method in enumerate(order)}
    return tuple(sorted(groups, key=lambda g: (g.is_proposed, rank.get(g.method, len(order)), g.label)))


def _shorten(value: str | None) -> str:
    if value is None:
        return "unset"
    text = value.strip('"')
    return text if len(text) <= _LONGEST_VALUE_IN_LABEL else "#" + hashlib.sha256(text.encode()).hexdigest()[:6]
