"""Claims against runs: supported, refuted, undecided or not applying; with interval, test, and what would decide it.

The rule. A claim is decided only where both sources of variance agree: the interval (over seeds and examples, for
quality) lies wholly on one side of the claim's bound, and a test over seeds rejects the bound in the same direction, at
5 % after Holm's correction over all claims' tests. Runs of one data set and seed count as one observation, whatever
their budgets. On one data set the test is Student's paired t; over several, Student's t with Satterthwaite's degrees of
freedom, for quality together with stratified sign flips, whose larger p-value counts. Runs that differ in more than the
method decide nothing. A claim whose premise is refuted does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.samples import sample_claim
from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.contrasts import (
    Estimate,
    MissingMeasurementError,
    Sample,
    blocks_of,
    estimate,
    share_seeds,
)
from fwlora.experiment.evaluation.compare.hypothesis_tests import (
    LEVEL,
    MAX_SEEDS,
    POWER,
    ROUNDING,
    holm_adjust,
    normal_quantile,
    seeds_needed,
    stratified_sign_flip_p_value,
)
from fwlora.experiment.evaluation.compare.results import Reason

Verdict = Literal["supported", "refuted", "undecided", "does not apply"]
# An event that occurs with this probability or more is ruled out at 5 % where it was not seen in n runs: p^n = 0.05.
_UNSEEN = 0.05


@dataclass(frozen=True)
class Finding:
    """A claim's contrast, interval and test in one cell, or in the mean over cells, in the unit of its measure.

    Attributes:
        cells: names of the cells that it was computed from.
        seeds: paired seeds in each of them.
        verdict: of this finding alone.
        value: the contrast; None where it could not be measured.
        low: lower end of its interval; None where there is none.
        high: upper end of its interval; None likewise.
        interval_over: what the interval covers.
        test: name of the test; None where none is possible.
        p_value: two-sided, at the bound.
        p_value_holm: corrected over all claims' tests.
        reasons: why it is undecided; empty where it is decided.
        remedies: what would decide it; empty likewise.
        left_out: cells, or seeds of them, that the claim covers and that do not count, with the reasons.
        caveat: what a decided finding on quality rests on: runs that did not learn, or that none of so few was one.
    """

    cells: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    verdict: Verdict = "undecided"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    interval_over: str | None = None
    test: str | None = None
    p_value: float | None = None
    p_value_holm: float | None = None
    reasons: tuple[Reason, ...] = ()
    remedies: tuple[Reason, ...] = ()
    left_out: tuple[Reason, ...] = ()
    caveat: str | None = None


@dataclass(frozen=True)
class ClaimResult:
    """A claim's verdict, and the findings that it rests on.

    Attributes:
        claim_id: name of the claim's file.
        claim: what was judged.
        verdict: over all findings.
        reasons: why it is undecided, or what else than its findings decided it.
        remedies: what would decide it; empty where it is decided.
        findings: one per cell, or one over all cells; empty where no cell has one of the claim's budgets.
    """

    claim_id: str
    claim: Claim
    verdict: Verdict
    reasons: tuple[Reason, ...]
    remedies: tuple[Reason, ...]
    findings: tuple[Finding, ...]


def join_reasons(reasons: Sequence[Reason]) -> str | None:
    """Return all reasons in one line; None where there are none."""
    return "; ".join(str(reason) for reason in reasons) or None


def group_undecided(results: Sequence[ClaimResult]) -> list[tuple[str, str, list[str]]]:
    """Group undecided claims by why, and by what would decide them.

    Returns:
        Reason, remedy, and the claims' ids, the commonest first.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.verdict == "undecided":
            why = "; ".join(dict.fromkeys(reason.text for reason in result.reasons))
            remedy = "; ".join(dict.fromkeys(reason.text for reason in result.remedies))
            grouped.setdefault((why, remedy), []).append(result.claim_id)
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return [(why, remedy, claims) for (why, remedy), claims in ordered]


@dataclass(frozen=True)
class _Measured:
    """A finding on the scale of the contrast (fractions, or logarithms of ratios), before correction."""

    claim: Claim
    samples: tuple[Sample, ...]
    estimate: Estimate
    bounds: tuple[float, float]
    supports: bool
    p_value: float | None
    test: str | None
    left_out: tuple[Reason, ...]


def judge_claims(
    claims: Mapping[str, Claim], cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int
) -> list[ClaimResult]:
    """Judge every claim, in the order of ``claims``."""
    measured = {
        name: [_measure(claim, group, resampled, rng_seed) for group in _split_cells(claim, cells)]
        for name, claim in claims.items()
    }
    units = [unit for each in measured.values() for unit in each]
    p_values = [unit.p_value if isinstance(unit, _Measured) else None for unit in units]
    tests = len([p_value for p_value in p_values if p_value is not None])
    adjusted = iter(holm_adjust(p_values))
    results: dict[str, ClaimResult] = {}
    for name, claim in claims.items():
        findings = []
        for unit in measured[name]:
            p_value_holm = next(adjusted)
            findings.append(_conclude(unit, p_value_holm, tests) if isinstance(unit, _Measured) else unit)
        results[name] = _combine(name, claim, tuple(findings), cells)
    return [_apply_requirement(result, results) for result in results.values()]


def _split_cells(claim: Claim, cells: Sequence[Cell]) -> list[list[Cell]]:
    """List the cells that the claim covers: one by one, or all together."""
    wanted = [cell for cell in cells if claim.covers(cell)]
    if claim.scope == "each_cell":
        return [[cell] for cell in wanted]
    return [wanted] if wanted else []


def _measure(claim: Claim, cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int) -> _Measured | Finding:
    samples: list[Sample] = []
    left_out: list[Reason] = []
    for cell in cells:
        try:
            samples.append(sample_claim(claim, cell, resampled))
        except MissingMeasurementError as reason:
            left_out.append(Reason(cell.name, str(reason)))
    if not samples:
        return Finding(
            cells=tuple(cell.name for cell in cells),
            reasons=tuple(left_out),
            remedies=(Reason(None, "such runs, with equal settings and the same seeds, two at least"),),
        )
    samples, without = share_seeds(samples)
    return _measure_samples(claim, samples, (*left_out, *without), rng_seed)


def judge_samples(claim: Claim, samples: Sequence[Sample], rng_seed: int = 0) -> Finding:
    """Judge one claim by itself, without a correction over others, on samples that are at hand.

    Args:
        claim: whose bounds count.
        samples: one per cell, at least one.
        rng_seed: of sign patterns.
    """
    unit = _measure_samples(claim, samples, (), rng_seed)
    return _conclude(unit, unit.p_value, 1)


def _measure_samples(claim: Claim, samples: Sequence[Sample], left_out: tuple[Reason, ...], rng_seed: int) -> _Measured:
    found = estimate(samples)
    low = -math.inf if claim.at_least is None else claim.unit.to_scale(claim.at_least)
    high = math.inf if claim.at_most is None else claim.unit.to_scale(claim.at_most)
    supports = low < found.mean < high
    test, p_value = _test(claim, samples, found, (low, high), supports, rng_seed)
    return _Measured(claim, tuple(samples), found, (low, high), supports, p_value, test, left_out)


def _test(
    claim: Claim,
    samples: Sequence[Sample],
    found: Estimate,
    bounds: tuple[float, float],
    supports: bool,
    rng_seed: int,
) -> tuple[str | None, float | None]:
    """Test the contrast against the bound nearest to it, in the direction in which it lies.

    Sign flips over several data sets would also reject a mean on the bound where one task lies above and another below;
    Student's t for the mean does not, but ignores scale differences between data sets; use the larger p-value.

    Returns:
        Name and two-sided p-value of the test; None, None where none is possible.
    """
    if any(len(sample.seeds) < 2 for sample in samples) or found.seeds.degrees_of_freedom is None:
        return None, None
    flips = found.seeds.strata > 1 and claim.unit.has_sign_flips

    def one_sided(bound: float, alternative: Literal["greater", "less"]) -> float:
        by_mean = found.seeds.p_value(bound, alternative)
        assert by_mean is not None, "what varies can be tested"
        if not flips:
            return by_mean
        rng = np.random.default_rng(rng_seed)
        shifted = [np.round(sample.values - bound, 12) for sample in samples]
        blocks = blocks_of(samples)
        return max(by_mean, stratified_sign_flip_p_value(shifted, rng, alternative, blocks=blocks))

    low, high = bounds
    finite = [math.isfinite(bound) for bound in bounds]
    if supports:
        inside = [one_sided(low, "greater")] * finite[0] + [one_sided(high, "less")] * finite[1]
        p_value = max(inside)
    else:
        p_value = one_sided(low, "less") if finite[0] and found.mean <= low else one_sided(high, "greater")
    name = "stratified sign flips and t" if flips else "paired t" if found.seeds.strata == 1 else "stratified paired t"
    return name, min(1.0, 2 * p_value)


def _conclude(unit: _Measured, p_value_holm: float | None, tests: int) -> Finding:
    found, from_scale = unit.estimate, unit.claim.unit.from_scale
    finding = Finding(
        cells=tuple(sample.cell for sample in unit.samples),
        seeds=tuple(len(sample.seeds) for sample in unit.samples),
        value=from_scale(found.mean),
        low=None if found.low is None else from_scale(found.low),
        high=None if found.high is None else from_scale(found.high),
        interval_over=found.interval_over,
        test=unit.test,
        p_value=unit.p_value,
        p_value_holm=p_value_holm,
        left_out=unit.left_out,
    )
    if any(len(sample.seeds) < 2 for sample in unit.samples):
        return _leave_open(finding, "no seed-level test possible: one paired seed", "two seeds at least")
    if unit.test is None:
        reason = "no test is possible: the differences are the same for all seeds"
        return _leave_open(finding, reason, "runs whose scores differ between seeds")
    assert found.low is not None and found.high is not None, "seeds that can be tested give an interval"
    low, high = unit.bounds
    within, beyond = low <= found.low and found.high <= high, found.high < low or high < found.low
    significant = p_value_holm is not None and p_value_holm <= LEVEL
    if significant and (within if unit.supports else beyond):
        return replace(finding, verdict="supported" if unit.supports else "refuted", caveat=_find_caveat(unit.samples))
    reason = "the interval reaches across the bound" if not (within or beyond) else "the test does not reject the bound"
    return _leave_open(finding, reason, _estimate_needs(unit, tests))


def _find_caveat(samples: Sequence[Sample]) -> str | None:
    """Say what a decision on quality rests on: collapsed runs that are counted, or the absence of any among few."""
    if any(sample.resampled is None for sample in samples):
        return None
    unlearned = list(dict.fromkeys(run_id for sample in samples for run_id in sample.unlearned))
    if unlearned:
        return f"it counts {len(unlearned)} runs that did not learn: {', '.join(unlearned)}"
    runs = sum(len(sample.seeds) for sample in samples)
    rate = 1 - _UNSEEN ** (1 / runs)
    return f"it rests on runs of which all learned; of {runs} runs of a method, up to {rate:.0%} could fail unseen"


def _leave_open(finding: Finding, reason: str, remedy: str) -> Finding:
    return replace(finding, reasons=(Reason(None, reason),), remedies=(Reason(None, remedy),))


def _estimate_needs(unit: _Measured, tests: int) -> str:
    """Estimate how many seeds would decide if the contrast is as measured; or how many examples, where seeds cannot.

    For a mean at distance d from the bound, its variance over examples, which no seed lowers, and its variance over
    seeds have to fit together: ``examples_error² + deviation² / n <= (d / (z_0.975 + z_0.8))²``.
    """
    found, deviation = unit.estimate, unit.estimate.seeds.deviation
    assert deviation is not None, "what was tested has two seeds or more"
    distance = min(abs(found.mean - bound) for bound in unit.bounds if math.isfinite(bound))
    if distance <= ROUNDING:
        return "nothing, if the value lies on the bound itself"
    allowed = distance / (normal_quantile(1 - LEVEL / 2) + normal_quantile(POWER))
    if found.examples_error >= allowed:
        smallest = min(sample.examples for sample in unit.samples)
        needed = math.ceil(smallest * (found.examples_error / allowed) ** 2)
        return (
            f"more than {needed:,} evaluation examples: seeds alone cannot, the value is too close to the bound for "
            f"the variance of {smallest:,} examples"
        )
    by_test = seeds_needed(distance, deviation, found.seeds.strata)
    by_interval = math.ceil(deviation**2 / (allowed**2 - found.examples_error**2))
    if by_test is None or by_interval > MAX_SEEDS:
        return f"more than {MAX_SEEDS:,} seeds: the value is too close to the bound"
    seeds, now = max(by_test, by_interval), max(len(sample.seeds) for sample in unit.samples)
    each = " in each cell" if len(unit.samples) > 1 else ""
    if seeds <= now:
        return f"more seeds than {now}{each}: the correction over {tests} tests asks for more than one claim alone"
    power = f"power {100 * POWER:.0f} %, one claim alone"
    return f"about {seeds} seeds{each}, if the value is what it seems ({power})"


def _combine(name: str, claim: Claim, findings: tuple[Finding, ...], cells: Sequence[Cell]) -> ClaimResult:
    """Combine the findings of all cells: one refuted finding refutes, one open finding leaves the claim undecided."""
    if not findings:
        budgets = ", ".join(f"{budget:g} %" for budget in claim.budgets or ())
        reason, remedy = Reason(None, f"no runs at a budget of {budgets}"), Reason(None, "runs at that budget")
        return ClaimResult(name, claim, "undecided", (reason,), (remedy,), ())
    verdicts = {finding.verdict for finding in findings}
    verdict: Verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    if verdict == "supported" and (missing := _find_missing_tasks(claim, findings, cells)):
        tasks = " and ".join(missing)
        reason = Reason(None, f"it speaks of {tasks} as well, of which there are no such runs")
        return ClaimResult(name, claim, "undecided", (reason,), (Reason(None, f"runs on {tasks}"),), findings)
    open_findings = [finding for finding in findings if finding.verdict == verdict == "undecided"]
    if len(findings) > 1:
        reasons = [_name_cell(finding, finding.reasons) for finding in open_findings]
        remedies = [_name_cell(finding, finding.remedies) for finding in open_findings]
    else:
        reasons = [reason for finding in open_findings for reason in finding.reasons]
        remedies = [remedy for finding in open_findings for remedy in finding.remedies]
    return ClaimResult(name, claim, verdict, tuple(reasons), tuple(remedies), findings)


def _name_cell(finding: Finding, reasons: Sequence[Reason]) -> Reason:
    return Reason(finding.cells[0], join_reasons(reasons) or "")


def _find_missing_tasks(claim: Claim, findings: Sequence[Finding], cells: Sequence[Cell]) -> list[str]:
    """List tasks of the claim's scope that were not measured, if other tasks of it were."""
    if claim.about is None:
        return []
    measured = {name for finding in findings for name in finding.cells}
    found = {claim.about.task_of(cell) for cell in cells if cell.name in measured and claim.about.contains(cell)}
    return [task for task in claim.about.tasks if task not in found] if found else []


def _apply_requirement(result: ClaimResult, results: Mapping[str, ClaimResult]) -> ClaimResult:
    """Set a claim aside whose premise is refuted; leave one open whose premise is open."""
    if result.claim.requires is None:
        return result
    premise = results[result.claim.requires]
    rests_on = f"it rests on “{premise.claim.statement}”, which is {premise.verdict}"
    if premise.verdict == "refuted":
        nothing = result.claim.without_premise
        reason = Reason(None, f"{nothing}: {rests_on}" if nothing else rests_on)
        return replace(result, verdict="does not apply", reasons=(reason,), remedies=(), findings=())
    if premise.verdict == "undecided" and result.verdict == "supported":
        return replace(result, verdict="undecided", reasons=(Reason(None, rests_on),), remedies=premise.remedies)
    if premise.verdict == "undecided" and result.verdict == "undecided":
        *others, last = result.reasons
        return replace(result, reasons=(*others, replace(last, text=f"{last.text}; and {rests_on}")))
    return result
