"""Pages of single runs, and the table of what all runs were made with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fwlora.experiment.evaluation.compare.bootstrap import confusion_matrix
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.evaluation.compare.settings import flatten_settings, format_setting
from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.tracking import metrics

NOT_RECORDED = "not recorded"

_TIMES = {
    metrics.TRAINING_TIME_S: "training (compared)",
    metrics.TIME_WARMUP_S: "of it, Fisher warm-up",
    metrics.TIME_TRAIN_S: "of it, remaining steps",
    metrics.TIME_EVAL_S: "evaluation",
    metrics.TIME_SEARCH_S: "search",
    metrics.STEP_TIME_MEDIAN_S: "median step",
}
_ENVIRONMENT_NAMES = {
    "python": "Python",
    "system": "system",
    "device": "device",
    "threads": "threads",
    "cpu_count": "CPU cores",
}
_PARAMETERS = {
    metrics.PARAMS_ADAPTER: "adapter, at the start",
    metrics.PARAMS_ADAPTER_FINAL: "adapter, in use at the end",
    metrics.BUDGET_PARAMETERS: "budget",
    metrics.PARAMS_HEAD: "head",
    metrics.PARAMS_TRAINABLE: "trainable",
    metrics.PARAMS_ENCODER: "encoder",
    metrics.PARAMS_TOTAL: "total",
}


@dataclass(frozen=True)
class Score:
    """An evaluation metric of one run, or its loss.

    Attributes:
        name: the metric's name, without ``eval_``.
        is_loss: whether it is the loss, which is not shown in points.
        final: after the last epoch.
        best: of the best epoch, which is never compared.
        epoch: the best epoch.
    """

    name: str
    is_loss: bool
    final: float | None
    best: float | None
    epoch: float | None


@dataclass(frozen=True)
class RunPage:
    """What the report shows of one run, except its figures.

    Attributes:
        run: the run.
        method: its label in the tables.
        primary: final value of the compared metric.
        scores: of all metrics.
        times: names and values in seconds.
        parameters: names and counts.
        percent_of_encoder: adapter parameters, in per cent of the encoder's.
        steps: optimizer steps.
        peak_memory_mib: in MiB.
        confusion: per gold class its name, and per predicted class the count and its share of the gold class; empty
            where labels are numbers.
        settings: names and values as text.
        facts: names and values of what the run was made with.
        command: that trained the run; None where it was not recorded.
    """

    run: EvaluatedRun
    method: str
    primary: float
    scores: list[Score]
    times: list[tuple[str, float]]
    parameters: list[tuple[str, float]]
    percent_of_encoder: float | None
    steps: float | None
    peak_memory_mib: float | None
    confusion: list[tuple[str, list[tuple[int, float]]]]
    settings: Mapping[str, str]
    facts: list[tuple[str, str]]
    command: str | None


@dataclass(frozen=True)
class Commands:
    """The different commands that trained the runs, and the number of runs that recorded none."""

    lines: list[str]
    missing: int


@dataclass(frozen=True)
class FactValue:
    """One value of a fact, with the runs that have it."""

    text: str
    runs: list[EvaluatedRun]


@dataclass(frozen=True)
class Fact:
    """Everything that runs record of one fact.

    Attributes:
        scope: the data set or pretrained model whose runs are compared; empty for all runs.
        name: of the fact.
        values: in order of the runs.
        of: number of runs in the scope.
    """

    scope: str
    name: str
    values: list[FactValue]
    of: int


@dataclass(frozen=True)
class FactTable:
    """Facts of one kind."""

    title: str
    rows: list[Fact]


def describe_run_page(cell: Cell, group: Group, run: EvaluatedRun) -> RunPage:
    """Collect what the report shows of a run, except its figures."""
    config, summary = run.record.config, run.record.summary
    return RunPage(
        run=run,
        method=group.label,
        primary=cell.read(run),
        scores=_read_scores(summary),
        times=_read_numbers(summary, _TIMES),
        parameters=_read_numbers(summary, _PARAMETERS),
        percent_of_encoder=as_finite(summary.get(metrics.ADAPTER_PERCENT_OF_ENCODER)),
        steps=as_finite(summary.get(metrics.TOTAL_STEPS)),
        peak_memory_mib=as_finite(summary.get(metrics.PEAK_MEMORY_MIB)),
        confusion=_count_predictions(run) if run.has_classes else [],
        settings={
            key: format_setting(value)
            for key, value in flatten_settings({k: v for k, v in config.items() if k != "resolved"}).items()
        },
        facts=[(name, read(run)) for name, read in _facts([run]).items()],
        command=run.facts.command,
    )


def _count_predictions(run: EvaluatedRun) -> list[tuple[str, list[tuple[int, float]]]]:
    counts = confusion_matrix(run.labels, run.predictions, len(run.label_names))
    totals = counts.sum(axis=1)
    return [
        (name, [(int(count), count / total if total else 0.0) for count in row])
        for name, row, total in zip(run.label_names, counts, totals, strict=True)
    ]


def collect_commands(runs: Sequence[EvaluatedRun]) -> Commands:
    """List commands in the order of the runs, each once."""
    commands = [run.facts.command for run in runs]
    return Commands(
        lines=list(dict.fromkeys(command for command in commands if command)),
        missing=sum(command is None for command in commands),
    )


def collect_facts(runs: Sequence[EvaluatedRun]) -> list[FactTable]:
    """List what the runs were made with, by kind: per fact every value with the runs that have it.

    Data are compared within a data set, encoders within a pretrained model: elsewhere they are meant to differ.
    """
    kinds: list[tuple[str, dict[str, list[EvaluatedRun]], Callable[[Sequence[EvaluatedRun]], JsonMapping]]] = [
        ("Code, versions and hardware", {"": list(runs)}, _environment_facts),
        ("Data", _split(runs, lambda run: run.cell_key.data), _data_facts),
        ("Model", _split(runs, lambda run: run.cell_key.pretrained), _model_facts),
    ]
    collected = []
    for title, scopes, list_facts in kinds:
        rows = []
        for scope, members in scopes.items():
            for name, read in list_facts(members).items():
                values = [FactValue(text, having) for text, having in _split(members, read).items()]
                rows.append(Fact(scope, name, values, len(members)))
        collected.append(FactTable(title, rows))
    return collected


def describe_commit(environment: JsonMapping) -> str:
    """Return the commit, with ``DIRTY`` behind it if the code had uncommitted changes."""
    commit = environment.get("commit") or NOT_RECORDED
    return f"{commit}, DIRTY" if environment.get("dirty") else str(commit)


def is_dirty(run: EvaluatedRun) -> bool:
    """Return whether the code that trained the run had uncommitted changes."""
    return bool(run.facts.environment.get("dirty"))


def describe_environment_facts(environment: JsonMapping) -> list[tuple[str, str]]:
    """List names and values of one environment, the commit first."""
    packages = environment.get("packages") or {}
    return [
        ("commit", describe_commit(environment)),
        *((shown, _show(environment.get(key))) for key, shown in _ENVIRONMENT_NAMES.items()),
        *((name, _show(packages[name])) for name in sorted(packages)),
    ]


def _split(runs: Sequence[EvaluatedRun], read: Callable[[EvaluatedRun], str]) -> dict[str, list[EvaluatedRun]]:
    found: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        found.setdefault(read(run), []).append(run)
    return found


def _facts(runs: Sequence[EvaluatedRun]) -> dict[str, Callable[[EvaluatedRun], str]]:
    return {**_environment_facts(runs), **_data_facts(runs), **_model_facts(runs)}


def _read_program_fact(name: str, run: EvaluatedRun) -> str:
    return _show(getattr(run.facts, name))


def _show(value: Any) -> str:
    return NOT_RECORDED if value is None else value if isinstance(value, str) else json.dumps(value)


def _environment_facts(runs: Sequence[EvaluatedRun]) -> dict[str, Callable[[EvaluatedRun], str]]:
    read = {id(run): dict(describe_environment_facts(run.facts.environment)) for run in runs}

    def read_fact(name: str, run: EvaluatedRun) -> str:
        return read[id(run)].get(name, NOT_RECORDED)

    names = dict.fromkeys(name for facts in read.values() for name in facts)
    return {**{name: partial(read_fact, name) for name in names}, "precision": partial(_read_program_fact, "precision")}


def _data_facts(runs: Sequence[EvaluatedRun]) -> dict[str, Callable[[EvaluatedRun], str]]:
    names = {
        "train_examples": "training examples",
        "train_fingerprint": "training data fingerprint",
        "eval_examples": "evaluation examples",
    }
    return {
        **{shown: partial(_read_program_fact, key) for key, shown in names.items()},
        "evaluation data fingerprint": lambda run: _show(run.record.summary.get(metrics.EVAL_FINGERPRINT)),
    }


def _model_facts(runs: Sequence[EvaluatedRun]) -> dict[str, Callable[[EvaluatedRun], str]]:
    return {"encoder fingerprint": lambda run: _show(run.record.summary.get(metrics.ENCODER_FINGERPRINT))}


def _read_numbers(summary: JsonMapping, names: Mapping[str, str]) -> list[tuple[str, float]]:
    found = [(shown, as_finite(summary.get(name))) for name, shown in names.items()]
    return [(shown, value) for shown, value in found if value is not None]


def _read_scores(summary: JsonMapping) -> list[Score]:
    prefix = metrics.final_name("")
    names = [name.removeprefix(prefix) for name in sorted(summary) if name.startswith(prefix)]
    return [
        Score(
            name=name.removeprefix(metrics.eval_name("")),
            is_loss=name == metrics.EVAL_LOSS,
            final=as_finite(summary[metrics.final_name(name)]),
            best=as_finite(summary.get(metrics.best_name(name))),
            epoch=as_finite(summary.get(metrics.best_epoch_name(name))),
        )
        for name in names
    ]
