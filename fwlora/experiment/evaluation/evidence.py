"""Everything that is computed from the runs, before anything is drawn or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.verdicts import ClaimResult, judge_claims
from fwlora.experiment.evaluation.compare.bootstrap import RESAMPLES, resample_runs
from fwlora.experiment.evaluation.compare.cells import Cell, PairChoice, group_cells
from fwlora.experiment.evaluation.compare.comparability import find_warnings
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.contrasts import Estimate, estimate, sample_quality
from fwlora.experiment.evaluation.compare.results import Comparison, ComparisonWarning
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, read_runs
from fwlora.experiment.tracking.records import RunRecord

RNG_SEED = 20_261_121


@dataclass(frozen=True)
class Evidence:
    """Everything that is computed from the runs.

    Attributes:
        runs: checked, in the order of their records.
        cells: groups of comparable runs.
        comparison: every paired comparison of methods.
        claim_results: one for each claim.
        warnings: what makes the comparison unequal or its numbers doubtful.
        means: every method's mean of the primary metric, with its interval, by cell and label.
    """

    runs: Sequence[EvaluatedRun]
    cells: Sequence[Cell]
    comparison: Comparison
    claim_results: Sequence[ClaimResult]
    warnings: Sequence[ComparisonWarning]
    means: Mapping[tuple[str, str], Estimate]


def gather_evidence(
    records: Sequence[RunRecord],
    claims: Mapping[str, Claim],
    rng_seed: int = RNG_SEED,
    resamples: int = RESAMPLES,
    choice: PairChoice | None = None,
) -> Evidence:
    """Check runs, compare methods and judge claims.

    Args:
        records: one per run.
        claims: to be judged, by id.
        rng_seed: of all resampling.
        resamples: of the bootstrap.
        choice: which pairs of methods are compared; None for the usual ones.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    runs = read_runs(records)
    cells = group_cells(runs)
    resampled = resample_runs(runs, rng_seed, resamples)
    return Evidence(
        runs=runs,
        cells=cells,
        comparison=compare_pairs(cells, resampled, rng_seed, choice),
        claim_results=judge_claims(claims, cells, resampled, rng_seed),
        warnings=find_warnings(cells, resampled, choice),
        means={
            (cell.name, group.label): estimate([sample_quality(cell, [(1.0, group)], resampled)])
            for cell in cells
            for group in cell.groups
        },
    )
