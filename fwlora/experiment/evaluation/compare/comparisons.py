"""The proposed method against each other one: per seed, per cell, and pooled over cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fwlora.experiment.evaluation.compare import hypothesis_tests as statistics
from fwlora.experiment.evaluation.compare.aggregate import improvement_rate
from fwlora.experiment.evaluation.compare.bootstrap import CONFIDENCE, ResampledRuns, percentile_interval
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.contrasts import (
    Sample,
    Terms,
    Unmeasured,
    blocks_of,
    estimate,
    sample_cost,
    sample_quality,
    share_seeds,
)
from fwlora.experiment.tracking import metrics

NO_SEED_TEST = "no seed-level test possible: one paired seed"
HEADLINE_TEST = "stratified sign flips over cells, runs of one data set and seed together"
NO_PAIR = "no seed-level test possible: no seed was run with both methods"


def describe_cells(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds of every group, per cell."""
    return [
        {
            "cell": cell.name,
            "primary_metric": cell.primary_eval_name,
            "methods": [_describe_group(cell, group) for group in cell.groups],
        }
        for cell in cells
    ]


def compare_pairs(cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int) -> dict[str, Any]:
    """Every paired test and interval, as plain data (the content of ``statistics.json``).

    Generators are seeded by ``rng_seed``, the data set and the roles of the pair, so a pair's interval does not depend
    on which other runs are evaluated. Holm's correction runs over each family: one test, on the primary metric, over
    all pairs of all cells (McNemar, on accuracy: over all pairs and seeds; headline: over all pairs of methods).
    """
    pairs = [_compare_pair(cell, *pair, resampled, rng_seed) for cell in cells for pair in cell.pairs()]
    pooled = _pool_pairs(cells, resampled, rng_seed)
    return {
        "difference": "first minus second, as fractions",
        "confidence": CONFIDENCE,
        "level": statistics.LEVEL,
        "power": statistics.POWER,
        "resamples": resampled.resamples,
        "rng_seed": rng_seed,
        "cells": describe_cells(cells),
        "pooled": pooled,
        "pairs": pairs,
        "holm": _correct_families(pairs, pooled),
    }


def _describe_group(cell: Cell, group: Group) -> dict[str, Any]:
    metric = cell.primary_eval_name
    return {
        "method": group.label,
        "role": group.role,
        "run_ids": [run.run_id for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "n": len(group.runs),
        "mean": group.mean(metric),
        "sd": group.standard_deviation(metric),
        "accuracy_mean": group.mean("eval_accuracy"),
        "training_time_s_mean": group.mean(metrics.TRAINING_TIME_S),
        "training_time_s_sd": group.standard_deviation(metrics.TRAINING_TIME_S),
        "params_adapter": group.mean(metrics.PARAMS_ADAPTER),
        "params_adapter_final": group.mean(metrics.PARAMS_ADAPTER_FINAL),
        "constant_predictions": sum(bool(np.ptp(run.predictions) == 0) for run in group.runs),
    }


def _compare_pair(cell: Cell, first: Group, second: Group, resampled: ResampledRuns, rng_seed: int) -> dict[str, Any]:
    terms: Terms = [(1.0, first), (-1.0, second)]
    described: dict[str, Any] = {
        "cell": cell.name,
        "first": first.label,
        "second": second.label,
        "second_is": "control" if second.role == "control" else "baseline",
        "primary_metric": cell.primary,
    }
    names = list(dict.fromkeys((cell.primary, "accuracy", "matthews_correlation")))
    try:
        samples = {name: sample_quality(cell, terms, resampled, name) for name in names}
    except Unmeasured:
        return {**described, "seeds": [], "seed_level_test": NO_PAIR, "per_seed": [], "over_seeds": {}}
    over_seeds = {}
    for name, sample in samples.items():
        found = estimate([sample], rng_seed)
        rng = np.random.default_rng(rng_seed)
        tests = asdict(statistics.compare_seeds(sample.values, rng))
        over_seeds[name] = {**tests, "low": found.low, "high": found.high, "interval_over": found.interval_over}
    seeds = samples[cell.primary].seeds
    ours, theirs = (
        float(np.mean([cell.read(run) for seed, run in group.by_seed().items() if seed in seeds]))
        for group in (first, second)
    )
    return {
        **described,
        "seeds": list(seeds),
        "seed_level_test": "paired t and exact sign-flip permutation" if len(seeds) > 1 else NO_SEED_TEST,
        "improvement_rate": improvement_rate(ours, theirs),
        "training_time_ratio": _ratio_of_times(cell, terms, rng_seed),
        "per_seed": [_compare_seed(first, second, samples, place) for place in range(len(seeds))],
        "over_seeds": over_seeds,
    }


def _ratio_of_times(cell: Cell, terms: Terms, rng_seed: int) -> dict[str, Any]:
    """Geometric mean over seeds of the ratio of training times, with Student's interval on its logarithm."""
    try:
        found = estimate([sample_cost(cell, terms)], rng_seed)
    except Unmeasured as reason:
        return {"ratio": None, "low": None, "high": None, "reason": str(reason)}
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return {"ratio": math.exp(found.mean), "low": ends[0], "high": ends[1]}


def _compare_seed(first: Group, second: Group, samples: dict[str, Sample], place: int) -> dict[str, Any]:
    seed = next(iter(samples.values())).seeds[place]
    ours, theirs = first.by_seed()[seed], second.by_seed()[seed]
    bootstrap = {}
    for name, sample in samples.items():
        assert sample.resampled is not None, "quality comes from examples"
        low, high = percentile_interval(sample.resampled[place])
        bootstrap[name] = {"difference": float(sample.values[place]), "low": low, "high": high}
    return {
        "seed": seed,
        "first_run_id": ours.run_id,
        "second_run_id": theirs.run_id,
        "mcnemar": asdict(statistics.mcnemar_exact(ours.labels, ours.predictions, theirs.predictions)),
        "bootstrap": bootstrap,
    }


def _pool_pairs(cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int) -> list[dict[str, Any]]:
    """The headline: each pair of methods over all cells that have both.

    Differences of one data set and seed flip together: they share head and data order, and where that makes them depend
    on each other, flipping them one by one (``p_value_independent``) finds too much.
    """
    by_name: dict[tuple[str, str], list[Sample]] = {}
    for cell in cells:
        for first, second in cell.pairs():
            try:
                sample = sample_quality(cell, [(1.0, first), (-1.0, second)], resampled)
            except Unmeasured:
                continue
            by_name.setdefault((first.label, second.label), []).append(sample)
    pooled = []
    for (first_label, second_label), samples in by_name.items():
        samples, left_out = share_seeds(samples)
        found = estimate(samples, rng_seed)
        testable = all(len(sample.seeds) > 1 for sample in samples)
        values = [sample.values for sample in samples]
        rng = np.random.default_rng(rng_seed)
        pooled.append(
            {
                "first": first_label,
                "second": second_label,
                "cells": [sample.cell for sample in samples],
                "pairs": sum(len(sample.seeds) for sample in samples),
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "interval_over": found.interval_over,
                "left_out": left_out,
                "test": HEADLINE_TEST if testable else NO_SEED_TEST,
                "p_value": (
                    statistics.stratified_sign_flip_p_value(values, rng, blocks=blocks_of(samples))
                    if testable
                    else None
                ),
                "p_value_independent": statistics.stratified_sign_flip_p_value(values, rng) if testable else None,
            }
        )
    return pooled


def _correct_families(
    pairs: Sequence[dict[str, Any]], pooled: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    families: dict[str, list[dict[str, Any]]] = {"headline": [], "paired_t": [], "sign_flip": [], "mcnemar": []}
    for entry in pooled:
        if entry["p_value"] is not None:
            families["headline"].append({key: entry[key] for key in ("first", "second", "p_value")})
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
