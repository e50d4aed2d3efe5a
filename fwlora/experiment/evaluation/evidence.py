"""What runs show: numbers alone, before anything is drawn or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.verdicts import Answer, judge_claims
from fwlora.experiment.evaluation.compare.bootstrap import RESAMPLES, resample_runs
from fwlora.experiment.evaluation.compare.cells import Cell, group_cells
from fwlora.experiment.evaluation.compare.comparability import find_warnings
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, read_runs
from fwlora.experiment.tracking.records import RunRecord

RNG_SEED = 20_261_121


@dataclass(frozen=True)
class Evidence:
    """What the runs show: numbers alone, before anything is drawn or written.

    Attributes:
        runs: checked, in the order of their records.
        cells: what is compared in what.
        statistics: see :func:`fwlora.experiment.evaluation.compare.comparisons.compare_pairs`.
        answers: to every claim.
        warnings: what makes the comparison unequal or its numbers doubtful.
    """

    runs: Sequence[EvaluatedRun]
    cells: Sequence[Cell]
    statistics: Mapping[str, Any]
    answers: Sequence[Answer]
    warnings: Sequence[str]


def gather_evidence(
    records: Sequence[RunRecord], claims: Mapping[str, Claim], rng_seed: int = RNG_SEED, resamples: int = RESAMPLES
) -> Evidence:
    """Check, compare and judge.

    Args:
        records: one per run.
        claims: to be answered, by id.
        rng_seed: of all resampling.
        resamples: of the bootstrap.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    runs = read_runs(records)
    cells = group_cells(runs)
    resampled = resample_runs(runs, rng_seed, resamples)
    return Evidence(
        runs=runs,
        cells=cells,
        statistics=compare_pairs(cells, resampled, rng_seed),
        answers=judge_claims(claims, cells, resampled, rng_seed),
        warnings=find_warnings(cells),
    )
