"""Linear contrasts between methods, paired by seed: in quality, in cost, in the norm of updates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fwlora.experiment.evaluation.compare.bootstrap import (
    CONFIDENCE,
    ResampledRuns,
    percentile_interval,
)
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.hypothesis_tests import (
    StratifiedMean,
    normal_quantile,
    stratified_mean,
)
from fwlora.experiment.evaluation.compare.references import has_learned
from fwlora.experiment.evaluation.compare.results import Reason
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.tracking import metrics

NORMAL_QUANTILE = normal_quantile((1 + CONFIDENCE) / 2)
# Of logarithms: five per cent.
MOST_APART = 0.05
Contrast = Sequence[tuple[float, Group]]
ImportanceHalf = Literal["least_important", "most_important"]


class MissingMeasurementError(Exception):
    """A contrast that cannot be computed from these runs; the message is the reason."""


@dataclass(frozen=True)
class Sample:
    """Values of a contrast in one cell, one for each seed that all its methods were run with.

    Attributes:
        cell: the cell's name.
        data: the cell's data set.
        contrast: its weights and roles, whatever their order.
        seeds: ascending, shape ``(S,)``.
        values: shape ``(S,)``.
        resampled: the same values on resamples of the evaluation examples, shape ``(S, R)``; None for what does not
            come from examples.
        examples: of the evaluation split.
        unlearned: ids of its runs that score no better than a constant prediction.
    """

    cell: str
    data: str
    contrast: str
    seeds: tuple[int, ...]
    values: np.ndarray
    resampled: np.ndarray | None
    examples: int
    unlearned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A contrast's mean over seeds, and over cells where there are several.

    Attributes:
        seeds: the mean, every cell counting alike, with its uncertainty over seeds.
        low: lower end of the interval at :data:`~.bootstrap.CONFIDENCE`; None where no variance can be estimated.
        high: upper end of the interval; None likewise.
        interval_over: what the interval covers: ``seeds and examples``, ``examples``, ``seeds`` or ``nothing``.
        examples_error: standard deviation over resamples of the examples alone: no number of seeds lowers it.
    """

    seeds: StratifiedMean
    low: float | None
    high: float | None
    interval_over: str
    examples_error: float

    @property
    def mean(self) -> float:
        """The mean over seeds and cells."""
        return self.seeds.estimate


def sample_quality(cell: Cell, contrast: Contrast, resampled: ResampledRuns, metric: str | None = None) -> Sample:
    """Compute Σ weight · metric(run), as fractions; of the cell's primary metric unless another is named.

    Raises:
        MissingMeasurementError: no seed was run with all methods.
    """
    name = metric or cell.primary
    chosen = _pair_runs(contrast)
    values = sum(weight * np.array([run.values[metrics.eval_name(name)] for run in runs]) for weight, runs in chosen)
    scores = sum(weight * resampled.stack(runs, name) for weight, runs in chosen)
    sample = _make_sample(cell, contrast, chosen[0][1], np.asarray(values), np.asarray(scores))
    return replace(sample, unlearned=tuple(run.run_id for _, runs in chosen for run in runs if not has_learned(run)))


def sample_cost(cell: Cell, contrast: Contrast, metric: str = metrics.TRAINING_TIME_S) -> Sample:
    """Compute Σ weight · log(cost of the run), whose exponential is a ratio.

    Raises:
        MissingMeasurementError: no seed was run with all methods, a cost was not recorded, the hardware differs, or, on
            a CPU, the processor's own time says otherwise than the clock.
    """
    runs = [run for _, members in _pair_runs(contrast) for run in members]
    if len(machines := sorted({_machine(run) for run in runs})) > 1:
        raise MissingMeasurementError(f"its times come from different machines ({'; '.join(machines)})")
    sample = _sample_logarithms(cell, contrast, lambda run: [run.values.get(metric)], metric)
    if metric == metrics.TRAINING_TIME_S and all(_computes_on_cpu(run) for run in runs):
        on_cpu = metrics.CPU_TIME_S
        computed = _sample_logarithms(cell, contrast, lambda run: [run.values.get(on_cpu)], on_cpu)
        apart = float(np.mean(sample.values) - np.mean(computed.values))
        if abs(apart) > MOST_APART:
            by_wall, by_cpu = (math.exp(float(np.mean(each.values))) for each in (sample, computed))
            raise MissingMeasurementError(
                f"wall-clock and CPU time disagree ({by_wall:.3f} and {by_cpu:.3f}): the machine was busy with other "
                "work"
            )
    return sample


def sample_update_norm(cell: Cell, contrast: Contrast, half: ImportanceHalf) -> Sample:
    """Compute Σ weight · mean over modules of log ‖ΔW‖_F, over half of the modules by the proposed run's importance.

    The modules are the same for all methods of a seed: those whose importance, as the proposed run of that seed
    measured it, is below its median (``least_important``) or not. Modules that some run did not update are left out.

    Raises:
        MissingMeasurementError: no seed was run with all methods, no importances, other modules, or no update left.
    """
    proposed = next((group for _, group in contrast if group.is_proposed), None)
    if proposed is None:
        raise MissingMeasurementError("importances are the proposed method's, which is not part of the contrast")
    by_seed = proposed.by_seed()
    chosen = _pair_runs(contrast)
    kept: dict[int, list[str]] = {}
    for seed in (run.seed for run in chosen[0][1]):
        importances = _modules(by_seed[seed], metrics.MODULE_IMPORTANCES)
        if not importances:
            raise MissingMeasurementError(f"run {by_seed[seed].run_id} recorded no importances")
        ranked = sorted(importances, key=lambda name: (importances[name], name))
        middle = len(ranked) // 2
        wanted = ranked[:middle] if half == "least_important" else ranked[middle:]
        norms = [_modules(run, metrics.MODULE_DELTA_NORMS) for _, runs in chosen for run in runs if run.seed == seed]
        kept[seed] = [name for name in wanted if all(norm.get(name, 0.0) > 0 for norm in norms)]
        if not kept[seed]:
            raise MissingMeasurementError(f"no module of seed {seed} was updated by all methods")

    def read(run: EvaluatedRun) -> list[float | None]:
        norms = _modules(run, metrics.MODULE_DELTA_NORMS)
        return [norms[name] for name in kept[run.seed]]

    return _sample_logarithms(cell, contrast, read, metrics.MODULE_DELTA_NORMS)


def share_seeds(samples: Sequence[Sample]) -> tuple[list[Sample], list[Reason]]:
    """Restrict samples of one data set to their common seeds.

    Inference over seeds treats (data set, seed) as one observation, so cells of a data set are restricted to the seeds
    that all of them have, if there are two or more. Cells of a single seed are left out where others have more, as no
    test is possible with them.

    Args:
        samples: one per cell.

    Returns:
        The samples that are kept, and what was left out with the reason.
    """
    left_out: list[Reason] = []
    if any(len(sample.seeds) > 1 for sample in samples):
        left_out += [Reason(sample.cell, "one paired seed") for sample in samples if len(sample.seeds) == 1]
        samples = [sample for sample in samples if len(sample.seeds) > 1]
    kept = []
    for sample in samples:
        shared = set.intersection(*(set(other.seeds) for other in samples if other.data == sample.data))
        places = [place for place, seed in enumerate(sample.seeds) if seed in shared]
        if 2 <= len(places) < len(sample.seeds):
            extra = ", ".join(str(seed) for seed in sample.seeds if seed not in shared)
            left_out.append(Reason(sample.cell, f"seeds {extra}, which its other budgets do not have"))
            rows = None if sample.resampled is None else sample.resampled[places]
            seeds = tuple(sample.seeds[place] for place in places)
            sample = replace(sample, seeds=seeds, values=sample.values[places], resampled=rows)
        kept.append(sample)
    return kept, left_out


def estimate(samples: Sequence[Sample]) -> Estimate:
    """Compute the mean and interval of a contrast over its cells.

    One seed: the percentiles of the bootstrap over examples. No examples, as for times: Student's t over seeds. Both:
    the two sources of variance are estimated apart, each with its own quantile,

    ``mean ± sqrt(t² (S² − I / 2) + z² (E − I / 2))``,

    S the standard error over seeds on these examples, t Student's quantile with its degrees of freedom (Satterthwaite's
    over several cells), E the bootstrap variance of the mean over seeds, z the normal quantile. Both S² and E hold the
    variance I that no other seed shares and no other example either; it is counted half in each, and estimated from
    what averaging the seeds takes from the examples' variance: ``I = (mean E of one seed − E) / (seeds − 1)``. With few
    seeds a bootstrap of them would be too narrow, since it knows no quantile of Student's: see
    ``benchmarks/interval_coverage.py``.

    Cells of one data set that were run with the same seeds share head, data order and whatever else a seed decides, so
    their values are averaged for each seed before inference over seeds; resamples of a shared split are the same.

    Args:
        samples: one per cell, at least one.

    Source: the sum of both with quantiles of their own is Graybill and Wang's, J. Amer. Statist. Assoc. 75 (1980).
    """
    merged = _merge_shared_seeds(samples)
    weights = [count for _, count in merged]
    means = stratified_mean([sample.values for sample, _ in merged], weights)
    resampled = [(count / sum(weights), row) for sample, count in merged if (row := sample.resampled) is not None]
    if len(resampled) < len(merged):
        low, high = means.interval(CONFIDENCE) or (None, None)
        return Estimate(means, low, high, "nothing" if low is None else "seeds", 0.0)
    over_examples = np.sum([share * row.mean(axis=0) for share, row in resampled], axis=0)
    variance = float(np.var(over_examples, ddof=1))
    if means.standard_error is None:
        return Estimate(means, *percentile_interval(over_examples), "examples", math.sqrt(variance))
    interaction = sum(share**2 * _estimate_interaction(row) for share, row in resampled)
    by_seeds = max(0.0, means.standard_error**2 - interaction / 2)
    by_examples = max(0.0, variance - interaction / 2)
    reach = math.hypot(means.quantile(CONFIDENCE) * math.sqrt(by_seeds), NORMAL_QUANTILE * math.sqrt(by_examples))
    return Estimate(means, means.estimate - reach, means.estimate + reach, "seeds and examples", math.sqrt(variance))


def _estimate_interaction(resampled: np.ndarray) -> float:
    """Estimate the part of the variance of a mean over seeds that neither seeds nor examples share.

    Args:
        resampled: a row of bootstrap values per seed, two at least, shape ``(S, R)``.
    """
    alone, together = resampled.var(axis=1, ddof=1).mean(), resampled.mean(axis=0).var(ddof=1)
    return max(0.0, float(alone - together) / (len(resampled) - 1))


def blocks_of(samples: Sequence[Sample]) -> list[list[tuple[str, int]]]:
    """List the block of every value: values of one data set and seed may depend on each other."""
    return [[(sample.data, seed) for seed in sample.seeds] for sample in samples]


def _merge_shared_seeds(samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """Average samples of one data set and the same seeds; each mean comes with its number of cells."""
    alike: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    for sample in samples:
        alike.setdefault((sample.data, sample.seeds), []).append(sample)
    merged = []
    for members in alike.values():
        values = np.mean([sample.values for sample in members], axis=0)
        rows = [sample.resampled for sample in members if sample.resampled is not None]
        resampled = np.mean(rows, axis=0) if len(rows) == len(members) else None
        merged.append((replace(members[0], values=values, resampled=resampled), len(members)))
    return merged


def _pair_runs(contrast: Contrast) -> list[tuple[float, list[EvaluatedRun]]]:
    """Pair each weight with its group's runs in the seeds that all groups have, ascending."""
    by_seed = [(weight, group.by_seed()) for weight, group in contrast]
    shared = sorted(set.intersection(*(set(runs) for _, runs in by_seed)))
    if not shared:
        raise MissingMeasurementError("no seed was run with all its methods")
    return [(weight, [runs[seed] for seed in shared]) for weight, runs in by_seed]


def _make_sample(
    cell: Cell, contrast: Contrast, runs: Sequence[EvaluatedRun], values: np.ndarray, resampled: np.ndarray | None
) -> Sample:
    return Sample(
        cell=cell.name,
        data=cell.data,
        contrast=" ".join(sorted(f"{weight:+g} {group.role}" for weight, group in contrast)),
        seeds=tuple(run.seed for run in runs),
        # Weights such as 1, -0.8, -0.2 leave rounding errors where values are equal; no test should see them.
        values=np.round(values, 12),
        resampled=None if resampled is None else np.round(resampled, 12),
        examples=runs[0].labels.size,
    )


def _computes_on_cpu(run: EvaluatedRun) -> bool:
    """Return whether a run's own time on the processor is known and is what its training took."""
    device = str(run.facts.environment.get("device") or "")
    return run.values.get(metrics.CPU_TIME_S, 0.0) > 0 and not re.search("NVIDIA|Tesla|AMD Instinct|cuda", device)


def _machine(run: EvaluatedRun) -> str:
    return f"{run.facts.environment.get('device')}, {run.facts.environment.get('threads')} threads"


def _modules(run: EvaluatedRun, metric: str) -> dict[str, float]:
    """Read values by module name; empty where the run recorded none."""
    summary: Mapping[str, object] = run.record.summary
    names, values = summary.get(metrics.MODULE_NAMES), summary.get(metric)
    if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
        return {}
    read = {str(name): as_finite(value) for name, value in zip(names, values, strict=True)}
    return {name: value for name, value in read.items() if value is not None}


def _sample_logarithms(
    cell: Cell, contrast: Contrast, read: Callable[[EvaluatedRun], Sequence[float | None]], metric: str
) -> Sample:
    chosen = _pair_runs(contrast)
    total = np.zeros(len(chosen[0][1]))
    for weight, runs in chosen:
        for place, run in enumerate(runs):
            values = read(run)
            if any(value is None or value <= 0 for value in values):
                raise MissingMeasurementError(f"run {run.run_id} recorded no positive {metric}")
            total[place] += weight * float(np.mean(np.log(np.array(values, dtype=np.float64))))
    return _make_sample(cell, contrast, chosen[0][1], total, None)
