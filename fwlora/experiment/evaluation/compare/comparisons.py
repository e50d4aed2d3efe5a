"""Pairs of methods: per seed, per cell, and pooled over cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns, percentile_interval
from fwlora.experiment.evaluation.compare.cells import Cell, Group, PairChoice
from fwlora.experiment.evaluation.compare.contrasts import (
    Contrast,
    MissingMeasurementError,
    Sample,
    blocks_of,
    estimate,
    sample_cost,
    sample_quality,
    share_seeds,
)
from fwlora.experiment.evaluation.compare.hypothesis_tests import (
    LEVEL,
    compare_seeds,
    holm_adjust,
    mcnemar_exact,
    smallest_sign_flip_p_value,
    stratified_sign_flip_p_value,
)
from fwlora.experiment.evaluation.compare.results import (
    Comparison,
    ExampleInterval,
    MeanDifference,
    PairComparison,
    PooledComparison,
    SeedComparison,
    TimeRatio,
)
from fwlora.experiment.tracking import task_metrics

SEED_TESTS = "paired t and exact sign-flip permutation"
NO_SEED_TEST = "no seed-level test possible: one paired seed"
HEADLINE_TEST = "stratified sign flips over cells, runs of one data set and seed together"
NO_PAIR = "no seed-level test possible: no seed was run with both methods"


def compare_pairs(
    cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int, choice: PairChoice | None = None
) -> Comparison:
    """Compute every paired test and interval.

    Generators are seeded by ``rng_seed``, the data set and the roles of the pair, so a pair's interval does not depend
    on which other runs are evaluated. Holm's correction runs over each family: one test, on the primary metric, over
    all pairs of all cells (McNemar, on accuracy: over all pairs and seeds; headline: over all pairs of methods).

    Args:
        cells: of all runs.
        resampled: scores of all runs on resamples of their examples.
        rng_seed: of sign patterns.
        choice: which pairs are compared; None for the usual ones.
    """
    choice = choice or PairChoice()
    pairs = [_compare_pair(cell, *pair, resampled, rng_seed) for cell in cells for pair in cell.pairs(choice)]
    pooled = _pool_pairs(cells, resampled, rng_seed, choice)
    adjusted = holm_adjust([entry.p_value for entry in pooled])
    return Comparison(
        resamples=resampled.resamples,
        rng_seed=rng_seed,
        pairs=tuple(_correct_pairs(pairs)),
        pooled=tuple(replace(entry, p_value_holm=holm) for entry, holm in zip(pooled, adjusted, strict=True)),
    )


def improvement_rate(proposed: float, baseline: float) -> float | None:
    """Return ``(proposed - baseline) / baseline``; None where the baseline is not positive and a rate means nothing."""
    return (proposed - baseline) / baseline if baseline > 0 else None


def _compare_pair(cell: Cell, first: Group, second: Group, resampled: ResampledRuns, rng_seed: int) -> PairComparison:
    contrast: Contrast = [(1.0, first), (-1.0, second)]
    compared = PairComparison(
        cell=cell.name,
        first=first.label,
        second=second.label,
        second_is="control" if second.is_control else "baseline",
        primary_metric=cell.primary,
        seeds=(),
        seed_level_test=NO_PAIR,
    )
    names = task_metrics.list_compared(cell.primary)
    try:
        samples = {name: sample_quality(cell, contrast, resampled, name) for name in names}
    except MissingMeasurementError:
        return compared
    seeds = samples[cell.primary].seeds
    means = [
        float(np.mean([cell.read(run) for seed, run in group.by_seed().items() if seed in seeds]))
        for group in (first, second)
    ]
    return replace(
        compared,
        seeds=seeds,
        seed_level_test=_name_seed_tests(len(seeds)),
        per_seed=tuple(_compare_seed(first, second, samples, index) for index in range(len(seeds))),
        over_seeds={name: _compare_over_seeds(sample, rng_seed) for name, sample in samples.items()},
        improvement_rate=improvement_rate(*means),
        training_time_ratio=_compare_times(cell, contrast),
    )


def _name_seed_tests(seeds: int) -> str:
    """Name the tests over so many seeds, and the smallest p-value that sign flips reach where that binds."""
    if seeds < 2:
        return NO_SEED_TEST
    smallest = smallest_sign_flip_p_value(seeds)
    return (
        SEED_TESTS
        if smallest <= LEVEL
        else f"{SEED_TESTS}, which {seeds} seeds let reach p = {smallest:g} at the least"
    )


def _compare_over_seeds(sample: Sample, rng_seed: int) -> MeanDifference:
    overall = estimate([sample])
    assert overall.low is not None and overall.high is not None, "examples always give an interval"
    tests = compare_seeds(sample.values, np.random.default_rng(rng_seed))
    return MeanDifference(tests, overall.low, overall.high, overall.interval_over)


def _compare_times(cell: Cell, contrast: Contrast) -> TimeRatio:
    try:
        overall = estimate([sample_cost(cell, contrast)])
    except MissingMeasurementError as reason:
        return TimeRatio(None, reason=str(reason))
    low, high = (None if end is None else math.exp(end) for end in (overall.low, overall.high))
    return TimeRatio(math.exp(overall.mean), low, high)


def _compare_seed(first: Group, second: Group, samples: Mapping[str, Sample], index: int) -> SeedComparison:
    seed = next(iter(samples.values())).seeds[index]
    ours, theirs = first.by_seed()[seed], second.by_seed()[seed]
    intervals = {}
    for name, sample in samples.items():
        assert sample.resampled is not None, "quality comes from examples"
        intervals[name] = ExampleInterval(float(sample.values[index]), *percentile_interval(sample.resampled[index]))
    return SeedComparison(
        seed=seed,
        first_run_id=ours.run_id,
        second_run_id=theirs.run_id,
        mcnemar=mcnemar_exact(ours.labels, ours.predictions, theirs.predictions) if ours.has_classes else None,
        intervals=intervals,
    )


def _pool_pairs(
    cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int, choice: PairChoice
) -> list[PooledComparison]:
    """Compare each pair of methods over all cells that have both."""
    by_labels: dict[tuple[str, str], list[Sample]] = {}
    for cell in cells:
        for first, second in cell.pairs(choice):
            try:
                sample = sample_quality(cell, [(1.0, first), (-1.0, second)], resampled)
            except MissingMeasurementError:
                continue
            by_labels.setdefault((first.label, second.label), []).append(sample)
    return [_pool_samples(*labels, samples, rng_seed) for labels, samples in by_labels.items()]


def _pool_samples(first: str, second: str, samples: Sequence[Sample], rng_seed: int) -> PooledComparison:
    samples, left_out = share_seeds(samples)
    overall = estimate(samples)
    assert overall.low is not None and overall.high is not None, "examples always give an interval"
    pooled = PooledComparison(
        first=first,
        second=second,
        cells=tuple(sample.cell for sample in samples),
        pairs=sum(len(sample.seeds) for sample in samples),
        mean=overall.mean,
        low=overall.low,
        high=overall.high,
        interval_over=overall.interval_over,
        left_out=tuple(left_out),
        test=NO_SEED_TEST,
    )
    if any(len(sample.seeds) < 2 for sample in samples):
        return pooled
    values = [sample.values for sample in samples]
    rng = np.random.default_rng(rng_seed)
    # Runs of one data set and seed share head and data order, so their differences may depend on each other.
    dependent = stratified_sign_flip_p_value(values, rng, blocks=blocks_of(samples))
    independent = stratified_sign_flip_p_value(values, rng)
    return replace(pooled, test=HEADLINE_TEST, p_value=dependent, p_value_independent=independent)


def _correct_pairs(pairs: Sequence[PairComparison]) -> list[PairComparison]:
    """Add p-values that are corrected by Holm over all pairs."""
    tests = [None if pair.primary is None else pair.primary.tests for pair in pairs]
    by_t = holm_adjust([None if test is None else test.t_p_value for test in tests])
    by_flips = holm_adjust([None if test is None else test.sign_flip_p_value for test in tests])
    tested = [seed.mcnemar for pair in pairs for seed in pair.per_seed]
    by_seed = iter(holm_adjust([None if test is None else test.p_value for test in tested]))
    return [
        replace(
            pair,
            t_p_value_holm=t_holm,
            sign_flip_p_value_holm=flip_holm,
            per_seed=tuple(replace(seed, mcnemar_p_value_holm=next(by_seed)) for seed in pair.per_seed),
        )
        for pair, t_holm, flip_holm in zip(pairs, by_t, by_flips, strict=True)
    ]
