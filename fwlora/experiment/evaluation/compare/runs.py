"""Check records of runs, and read what a comparison needs; names of runs do not matter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.compare.settings import flatten_settings, list_distinct
from fwlora.experiment.evaluation.compare.variants import find_variant
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods import Variant
from fwlora.experiment.settings.schema import RunSettings, run_settings_class, searchable_paths
from fwlora.experiment.tracking import metrics, task_metrics
from fwlora.experiment.tracking.facts import RunFacts
from fwlora.experiment.tracking.records import RunRecord, unpack_logits, unpack_values

_UNFINISHED = {
    "running": "is unfinished: it still runs, or its server lost sight of it; wait for it, or run it again",
    "failed": "is unfinished: it failed or was killed, as the end of its log may say; run it again",
    "crashed": "is unfinished: it crashed, it was killed, or the end of its record is damaged; run it again",
    "finished": "is unfinished: it ended before its last epoch was evaluated; run it again",
}
_IDENTITY = ("run_id", "training.seed")
CALIBRATION_BINS = 15
COST_NAMES = (
    metrics.TRAINING_TIME_S,
    metrics.CPU_TIME_S,
    metrics.LOAD_AVERAGE,
    metrics.STEP_TIME_MEDIAN_S,
    metrics.TIME_SEARCH_S,
    metrics.PEAK_MEMORY_MIB,
    metrics.PARAMS_ADAPTER,
    metrics.PARAMS_ADAPTER_FINAL,
)


@dataclass(frozen=True)
class Budget:
    """How many adapter parameters a run may have: a share of the encoder's, or a rank for every matrix.

    Attributes:
        percent: of the encoder's parameters; None where the rank decides.
        rank: None where the share decides, and where none is recorded.
        searched: whether a search chose the rank.
    """

    percent: float | None = None
    rank: int | None = None
    searched: bool = False

    @property
    def number(self) -> float:
        """The per cent, or the rank; 0 where none is known."""
        return self.percent if self.percent is not None else float(self.rank or 0)

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g} %"
        return f"rank {'searched' if self.searched else self.rank}"


@dataclass(frozen=True)
class CellKey:
    """What runs must have in common to be compared.

    Attributes:
        data: data set and subset, as recorded.
        model: the model's name.
        pretrained: id of the pretrained weights.
        budget: of adapter parameters.
    """

    data: str
    model: str
    pretrained: str
    budget: Budget

    def display(self, with_pretrained_id: bool = False) -> str:
        """Write ``glue/cola, roberta-base, 0.2 %``."""
        return ", ".join((self.data, self.pretrained if with_pretrained_id else self.model, str(self.budget)))


@dataclass(frozen=True)
class EvaluatedRun:
    """A record that can be compared.

    Attributes:
        record: as read.
        seed: ``training.seed``.
        variant: what it is compared as.
        facts: what the program found out when it trained the run.
        recorded: every setting by dotted key.
        settings: those of ``recorded`` that define a group: without run id, seed and what a search replaced.
        cell_key: what it can be compared in.
        primary: the task metric that is compared, such as ``matthews_correlation``.
        values: final metrics by eval name (``eval_accuracy``), and costs; all finite.
        labels: gold classes (int64) or numbers (float32) of the evaluation split, shape ``(n,)``.
        predictions: predicted ones, shape ``(n,)``.
        label_names: one per class; empty where labels are numbers.
    """

    record: RunRecord
    seed: int
    variant: Variant
    facts: RunFacts
    recorded: JsonMapping
    settings: JsonMapping
    cell_key: CellKey
    primary: str
    values: Mapping[str, float]
    labels: np.ndarray
    predictions: np.ndarray
    label_names: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """The id that it was started under."""
        return self.record.run_id

    @property
    def run(self) -> RunSettings:
        """Its settings; read anew each time, as the class depends on the methods of this process."""
        return run_settings_class().from_record(self.record.config["run"])

    @property
    def has_classes(self) -> bool:
        """Whether labels and predictions are classes; else they are numbers."""
        return bool(self.label_names)

    @property
    def num_classes(self) -> int:
        """How many classes its labels have; 0 where they are numbers."""
        return len(self.label_names)

    @property
    def method(self) -> str:
        """The method's name in its settings."""
        return str(self.recorded["method"])


def as_finite(value: Any) -> float | None:
    """Return the number; None for what is missing, text ("NaN" as W&B returns it), boolean, or beyond a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


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
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            found = [f"records what src.train does not write ({type(error).__name__}: {error}); leave it out"]
        problems.extend(f"run {record.run_id!r} {problem} (read from {record.source})" for problem in found)
    for data in sorted({run.cell_key.data for run in runs}):
        problems.extend(_find_data_problems(data, [run for run in runs if run.cell_key.data == data]))
    problems.extend(_find_repetitions(runs))
    if problems:
        raise UserError.collect("cannot evaluate, nothing was written", problems)
    return runs


def _primary_eval_name(record: RunRecord) -> str | None:
    return record.summary.get(metrics.PRIMARY_METRIC) or _read_facts(record).primary_metric


def _read_facts(record: RunRecord) -> RunFacts:
    return RunFacts.from_record(record.config.get("resolved"))


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
    known = [metrics.eval_name(name) for name in task_metrics.TASK_METRICS]
    if primary not in known:
        return [*found, f"has the primary metric {primary!r}; one of {known} is expected"]
    metric = str(primary).removeprefix(metrics.eval_name(""))
    needed = [metrics.final_name(metrics.eval_name(name)) for name in task_metrics.list_compared(metric)]
    for name in (*needed, metrics.TRAINING_TIME_S):
        value, number = summary.get(name), as_finite(summary.get(name))
        if number is None:
            found.append(f"has no {name}" if value is None else f"has {name} = {value}, which is no finite number")
        elif name == metrics.TRAINING_TIME_S and number < 0:
            found.append(f"has {name} = {value}, which is no duration")
    for name in (primary, metrics.TRAIN_LOSS):
        if not any(as_finite(row.get(name)) is not None for row in record.history):
            found.append(f"has no {name} in its history")
    return found + _find_prediction_problems(record, task_metrics.TASK_METRICS[metric].predicts)


def _find_prediction_problems(record: RunRecord, predicts: task_metrics.Predicted) -> list[str]:
    summary = record.summary
    names = (metrics.EVAL_FINGERPRINT, metrics.EVAL_LABELS, metrics.EVAL_PREDICTIONS)
    missing = [f"has no {name}" for name in names if not summary.get(name)]
    num_classes = len(_read_facts(record).label_names)
    if predicts == "classes" and num_classes < 2:
        missing.append("records no label names (config.resolved.label_names)")
    if missing:
        return missing
    try:
        labels, predictions = (unpack_values(summary[name]) for name in names[1:])
    except (ValueError, KeyError, TypeError) as error:
        return [f"has predictions or labels that cannot be read: {error}"]
    if labels.size == 0 or labels.shape != predictions.shape:
        return [f"has {predictions.size} predictions for {labels.size} labels"]
    if {labels.dtype.kind, predictions.dtype.kind} != {"i" if predicts == "classes" else "f"}:
        return [f"has predictions or labels that are no {predicts}, which its primary metric needs"]
    if predicts == "numbers":
        if num_classes:
            return [f"has a primary metric of numbers and {num_classes} label names"]
        return [] if np.isfinite([labels, predictions]).all() else ["has predictions or labels that are not finite"]
    if max(labels.max(), predictions.max()) >= num_classes:
        return [f"has classes beyond its {num_classes} label names"]
    return _find_logit_problems(summary.get(metrics.EVAL_LOGITS), (labels.size, num_classes))


def _find_logit_problems(packed: JsonMapping | None, shape: tuple[int, int]) -> list[str]:
    """Find what is wrong with logits, which older programs did not record."""
    if not packed:
        return []
    try:
        logits = unpack_logits(packed)
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        return [f"has logits that cannot be read: {error}"]
    if logits.shape != shape or not np.isfinite(logits).all():
        return [f"has logits of shape {logits.shape}, or some that are not finite; {shape} is expected"]
    return []


def calibration_error(labels: np.ndarray, logits: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Compute the expected calibration error: mean |accuracy − confidence| over bins of equal width of the confidence.

    Args:
        labels: gold classes, shape ``(n,)``.
        logits: shape ``(n, K)``; the confidence is the largest probability.
        bins: of (0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    scores = logits.astype(np.float64)
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    confidence = probabilities.max(axis=1) / probabilities.sum(axis=1)
    right = logits.argmax(axis=1) == labels
    places = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / labels.size)


def _read_run(record: RunRecord) -> EvaluatedRun:
    node, summary = record.config["run"], record.summary
    run, facts, recorded = run_settings_class().from_record(node), _read_facts(record), flatten_settings(node)
    task_values = {
        metrics.eval_name(name): metrics.final_name(metrics.eval_name(name)) for name in task_metrics.TASK_METRICS
    }
    sources = {**task_values, **{name: name for name in COST_NAMES}, "eval_loss": metrics.final_name("eval_loss")}
    values = {name: as_finite(summary.get(source)) for name, source in sources.items()}
    labels = unpack_values(summary[metrics.EVAL_LABELS])
    if summary.get(metrics.EVAL_LOGITS):
        values[metrics.EVAL_ECE] = calibration_error(labels, unpack_logits(summary[metrics.EVAL_LOGITS]))
    return EvaluatedRun(
        record=record,
        seed=_whole(run.training.seed),
        variant=find_variant(run),
        facts=facts,
        recorded=recorded,
        settings=_comparable_settings(run, recorded),
        cell_key=_find_cell(run),
        primary=str(_primary_eval_name(record)).removeprefix(metrics.eval_name("")),
        values={name: value for name, value in values.items() if value is not None},
        labels=labels,
        predictions=unpack_values(summary[metrics.EVAL_PREDICTIONS]),
        label_names=facts.label_names,
    )


def _find_cell(run: RunSettings) -> CellKey:
    model, dataset = run.model, run.dataset
    if model.ranks_are_fixed or model.parameter_budget_percent is None:
        budget = Budget(rank=model.lora.rank, searched="lora_rank" in _searched_names(run))
    else:
        budget = Budget(percent=float(f"{float(model.parameter_budget_percent):g}"))
    data = "/".join(str(part) for part in (dataset.name, dataset.subset) if part)
    pretrained = str(model.pretrained_id or model.name)
    return CellKey(data, str(model.name or pretrained), pretrained, budget)


def _whole(seed: Any) -> int:
    if int(seed) != seed:
        raise ValueError(f"training.seed is {seed!r}, which is no whole number")
    return int(seed)


def _searched_names(run: RunSettings) -> set[str]:
    return set(run.optuna.search_space or {}) if run.optuna.n_trials else set()


def _comparable_settings(run: RunSettings, recorded: JsonMapping) -> JsonObject:
    # What a search found is a result of the run, not a setting: it may differ between seeds of one group.
    names = _searched_names(run)
    if not run.model.ranks_are_fixed:
        names.discard("lora_rank")
    searched = {".".join(path) for name, path in searchable_paths().items() if name in names}
    return {key: value for key, value in sorted(recorded.items()) if key not in _IDENTITY and key not in searched}


def _find_data_problems(data: str, runs: Sequence[EvaluatedRun]) -> list[str]:
    """Find what forbids to compare, or pool, runs of one data set."""
    found = []
    checks = {
        "were evaluated on different examples (eval_fingerprint)": lambda run: run.record.summary["eval_fingerprint"],
        "compare different primary metrics": lambda run: run.primary,
        "have different label names": lambda run: ",".join(run.label_names),
        "have different gold labels (checksum)": lambda run: zlib.crc32(run.labels.tobytes()),
    }
    for message, read in checks.items():
        if len({str(read(run)) for run in runs}) > 1:
            found.append(f"{data}: runs {message}: " + ", ".join(f"{run.run_id} ({read(run)})" for run in runs))
    return found


def _find_repetitions(runs: Sequence[EvaluatedRun]) -> list[str]:
    problems = []
    identities = [(run.cell_key, run.seed, run.settings) for run in runs]
    for identity in list_distinct(identities):
        alike = [run for run, other in zip(runs, identities, strict=True) if other == identity]
        if len(alike) > 1:
            names = ", ".join(run.run_id for run in alike)
            cell = identity[0].display()
            problems.append(f"{cell}: runs {names} record the same settings and the same seed; pass one of them")
    return problems
