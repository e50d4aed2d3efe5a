"""Find what makes a comparison unequal, or its numbers doubtful."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns, confusion_matrix, percentile_interval
from fwlora.experiment.evaluation.compare.cells import Cell, Group, PairChoice
from fwlora.experiment.evaluation.compare.references import describe_reference
from fwlora.experiment.evaluation.compare.results import ComparisonWarning
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.evaluation.compare.settings import list_distinct, shorten_setting
from fwlora.experiment.json_types import JsonObject
from fwlora.experiment.methods import find_method, method_nodes
from fwlora.experiment.tracking import metrics, task_metrics

_SETTING_KINDS = {"optuna": "search", "dataset": "data", "training": "training settings", "model": "model settings"}
_MIN_BUDGET_SHARE = 0.95
_MAX_DISAGREEMENT = 1e-4
_POOLED_SETTINGS = ("training.learning_rate", "training.epochs", "training.batch_size")
# Facts that invalidate a comparison if they differ; differences of versions and commits are reported only.
DECIDING_FACTS = ("precision", "steps", "encoder weights", "engine", "data")


def find_warnings(
    cells: Sequence[Cell], resampled: ResampledRuns, choice: PairChoice | None = None
) -> list[ComparisonWarning]:
    """List what makes a comparison unequal or its numbers doubtful.

    Args:
        cells: of all runs.
        resampled: scores of all runs on resamples of their examples.
        choice: which pairs are compared; None for the usual ones.
    """
    warnings: list[ComparisonWarning] = []
    for cell in cells:
        problems = (
            find_unequal_settings(cell.groups)
            + find_unequal_facts(cell.runs)
            + _find_unequal_seeds(cell, choice or PairChoice())
        )
        problems += [problem for run in cell.runs for problem in _find_doubts(run, resampled)]
        problems += _find_equal_predictions(cell)
        warnings.extend(ComparisonWarning(cell.name, problem) for problem in problems)
    return warnings + _find_unequal_methods(cells)


def _find_unequal_methods(cells: Sequence[Cell]) -> list[ComparisonWarning]:
    """Find settings of one method that differ between the cells over which it is pooled."""
    found = []
    by_label: dict[str, list[tuple[Cell, Group]]] = {}
    for cell in cells:
        for group in cell.groups:
            by_label.setdefault(group.label, []).append((cell, group))
    for label, members in by_label.items():
        spec = find_method(members[0][1].runs[0].method)
        pooled = _POOLED_SETTINGS + (() if spec is None else spec.strength_settings)
        keys = {key for _, group in members for key in group.settings if key in pooled}
        for key in sorted(keys):
            values = [group.settings.get(key) for _, group in members]
            distinct = list_distinct(values)
            if len(distinct) > 1:
                cells_of = [members[values.index(value)][0].name for value in distinct]
                shown = zip(distinct, cells_of, strict=True)
                where = "; ".join(f"{shorten_setting(value)} in {name}" for value, name in shown)
                found.append(ComparisonWarning(None, f"{label} is pooled over cells with unlike {key}: {where}"))
    return found


def find_unequal_settings(groups: Sequence[Group]) -> list[str]:
    """Find settings, other than the method's own, in which groups of a cell differ, one sentence each."""
    settings = [group.settings for group in groups]
    method_settings = ("method", *(f"{node}." for node in method_nodes()))
    searches = any((group.runs[0].run.optuna.n_trials or 0) > 0 for group in groups)
    found = []
    for key in sorted({key for each in settings for key in each}):
        kind = _SETTING_KINDS.get(key.split(".", 1)[0])
        if key.startswith(method_settings) or (kind == "search" and not searches):
            continue
        if len(list_distinct(each.get(key) for each in settings)) > 1:
            values = (f"{shorten_setting(group.settings.get(key))} for {group.label}" for group in groups)
            found.append(f"unequal {kind or 'settings'}: {key} is {', '.join(values)}")
    return found


def find_unequal_facts(runs: Sequence[EvaluatedRun], kinds: Sequence[str] | None = None) -> list[str]:
    """Find facts about runs, such as hardware or data, in which they differ, one sentence each.

    Args:
        runs: of one cell.
        kinds: prefixes of the names of facts to compare; None for all.
    """
    facts = {run.run_id: _read_facts(run) for run in runs}
    found = []
    for name in dict.fromkeys(name for read in facts.values() for name in read):
        if kinds is not None and not name.startswith(tuple(kinds)):
            continue
        by_value: dict[str, list[str]] = {}
        for run_id, read in facts.items():
            by_value.setdefault(str(read.get(name)), []).append(run_id)
        if len(by_value) > 1:
            shares = (f"{value} for {_name_some(run_ids)}" for value, run_ids in by_value.items())
            found.append(f"unequal {name}: {', '.join(shares)}")
    return found


def _read_facts(run: EvaluatedRun) -> JsonObject:
    config, summary = run.record.config, run.record.summary
    facts, environment = run.facts, run.facts.environment
    fingerprints = {"eval_fingerprint": facts.eval_fingerprint, "train_fingerprint": facts.train_fingerprint}
    return {
        "precision": facts.precision,
        "kernels": facts.kernels,
        **{f"data ({name})": value for name, value in fingerprints.items() if value is not None},
        "steps": summary.get(metrics.TOTAL_STEPS),
        "encoder weights": summary.get(metrics.ENCODER_FINGERPRINT),
        **{f"engine ({key})": (config.get("engine") or {}).get(key) for key in ("fast", "batches", "cuda_graphs")},
        "hardware": environment.get("device"),
        "threads": environment.get("threads"),
        "commit": environment.get("commit"),
        **{f"version of {name}": version for name, version in sorted((environment.get("packages") or {}).items())},
    }


def _name_some(run_ids: Sequence[str]) -> str:
    return run_ids[0] if len(run_ids) == 1 else f"{run_ids[0]} and {len(run_ids) - 1} more"


def _find_unequal_seeds(cell: Cell, choice: PairChoice) -> list[str]:
    found = []
    for first, second in cell.pairs(choice):
        ours, theirs = ({run.seed for run in group.runs} for group in (first, second))
        if ours != theirs:
            found.append(
                f"unequal seeds: {sorted(ours)} for {first.label}, {sorted(theirs)} for {second.label}; "
                f"{len(ours & theirs)} can be paired"
            )
    return found


def find_disagreement(run: EvaluatedRun) -> str | None:
    """Describe how a recorded metric differs from the one of the run's own predictions; None where it does not."""
    for name in dict.fromkeys((task_metrics.shown_beside(run.primary), run.primary)):
        recorded, recomputed = run.values[metrics.eval_name(name)], _recompute(run, name)
        if abs(recomputed - recorded) > _MAX_DISAGREEMENT:
            return f"run {run.run_id} records {name} {recorded:.4f}, its predictions give {recomputed:.4f}"
    return None


def _recompute(run: EvaluatedRun, name: str) -> float:
    """Return a task metric of the run's own predictions."""
    if run.has_classes:
        confusion = confusion_matrix(run.labels, run.predictions, len(run.label_names))
        return float(task_metrics.score_confusion(name, confusion))
    once = np.ones((1, run.labels.size))
    return float(task_metrics.score_counts(name, run.labels, run.predictions[None], once)[0, 0])


def _find_equal_predictions(cell: Cell) -> list[str]:
    """Find runs of different methods whose predictions are the same, though they vary."""
    found = []
    for place, first in enumerate(cell.groups):
        for second in cell.groups[place + 1 :]:
            for seed, run in first.by_seed().items():
                other = second.by_seed().get(seed)
                if other is None or np.ptp(run.predictions) == 0:
                    continue
                if np.array_equal(run.predictions, other.predictions):
                    pair = f"{run.run_id} and {other.run_id}"
                    found.append(f"runs {pair} predict the same for every example: is the method in effect?")
    return found


def _find_doubts(run: EvaluatedRun, resampled: ResampledRuns) -> list[str]:
    disagreement = find_disagreement(run)
    low, _ = percentile_interval(resampled.scores[run.run_id, run.primary])
    # Values that its predictions contradict say nothing of what it learned.
    unlearned = None if disagreement and np.ptp(run.predictions) else describe_reference(run, low)
    found = [problem for problem in (disagreement, unlearned) if problem]
    cut = {"training": run.facts.train_examples_cut, "evaluation": run.facts.eval_examples_cut}
    found += [
        f"run {run.run_id}: {count} {split} examples were longer than max_length and cut"
        for split, count in cut.items()
        if count
    ]
    summary = run.record.summary
    budget, used = as_finite(summary.get(metrics.BUDGET_PARAMETERS)), run.values.get(metrics.PARAMS_ADAPTER_FINAL)
    if budget and used is not None and (used > budget or used < _MIN_BUDGET_SHARE * budget):
        share = f"{100 * used / budget:.0f} % of its budget of {budget:.0f}"
        found.append(f"run {run.run_id} uses {used:.0f} adapter parameters, {share}")
    return found
