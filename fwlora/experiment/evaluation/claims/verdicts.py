"""Claims against runs: supported, refuted or undecided, with interval and test, and what would decide it.

The rule. A claim is decided only where both sources of variance agree: the interval (over seeds and examples, for
quality) lies wholly on one side of the claim's bound, and a test over seeds rejects the bound in the same direction, at
5 % after Holm's correction over all claims' tests. Runs of one data set and seed count as one observation, whatever
their budgets. On one data set the test is Student's paired t; over several, Student's t with Satterthwaite's degrees of
freedom, for quality together with stratified sign flips, whose larger p-value counts. Runs that differ in more than the
method decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.samples import sample_claim
from fwlora.experiment.evaluation.compare import hypothesis_tests as statistics
from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.contrasts import (
    Estimate,
    Sample,
    Unmeasured,
    blocks_of,
    estimate,
    share_seeds,
)
from fwlora.experiment.evaluation.compare.hypothesis_tests import LEVEL

Verdict = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim in one cell, or in the mean over cells. Values are points, or ratios.

    Attributes:
        cells: that it comes from.
        seeds: paired seeds in each of them.
        verdict: of this finding alone.
        value, low, high: the contrast and its interval; None where it could not be measured.
        interval_over: what the interval speaks of.
        test: name of the test; None where none is possible.
        p_value: two-sided, at the bound.
        p_value_holm: corrected over all claims' tests.
        reason: why it is undecided; None where it is not.
        decided_by: what would decide it; None likewise.
        left_out: cells, or seeds of them, that the claim speaks of and that do not count, each with the reason.
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
    reason: str | None = None
    decided_by: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A claim's verdict, and the findings that it rests on."""

    claim_id: str
    claim: Claim
    verdict: Verdict
    reason: str | None
    decided_by: str | None
    findings: tuple[Finding, ...]


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
    left_out: tuple[str, ...]


def judge_claims(
    claims: Mapping[str, Claim], cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int
) -> list[Answer]:
    """Every claim's answer, in the order of ``claims``."""
    measured = {
        name: [_measure(claim, group, resampled, rng_seed) for group in _split_cells(claim, cells)]
        for name, claim in claims.items()
    }
    tested = [
        unit
        for units in measured.values()
        for unit in units
        if isinstance(unit, _Measured) and unit.p_value is not None
    ]
    corrected = statistics.holm_adjust([unit.p_value for unit in tested if unit.p_value is not None])
    holm = {id(unit): value for unit, value in zip(tested, corrected, strict=True)}
    answers: dict[str, Answer] = {}
    for name, claim in claims.items():
        findings = [
            _conclude(unit, holm.get(id(unit)), len(tested)) if isinstance(unit, _Measured) else unit
            for unit in measured[name]
        ]
        answers[name] = _answer(name, claim, tuple(findings), cells)
    return [_with_requirement(answer, answers) for answer in answers.values()]


def _split_cells(claim: Claim, cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells that the claim speaks of: one by one, or all together."""
    wanted = [cell for cell in cells if claim.speaks_of(cell)]
    if claim.scope == "each_cell":
        return [[cell] for cell in wanted]
    return [wanted] if wanted else []


def _measure(claim: Claim, cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int) -> _Measured | Finding:
    samples, left_out = [], []
    for cell in cells:
        try:
            samples.append(sample_claim(claim, cell, resampled))
        except Unmeasured as reason:
            left_out.append(f"{cell.name}: {reason}")
    if not samples:
        return Finding(
            cells=tuple(cell.name for cell in cells),
            reason="; ".join(left_out),
            decided_by="such runs, with equal settings and the same seeds, two at least",
        )
    samples, without = share_seeds(samples)
    found = estimate(samples, rng_seed)
    low, high = _to_scale(claim, claim.at_least, -math.inf), _to_scale(claim, claim.at_most, math.inf)
    supports = low < found.mean < high
    test, p_value = _test(claim, samples, found, (low, high), supports, rng_seed)
    return _Measured(claim, tuple(samples), found, (low, high), supports, p_value, test, (*left_out, *without))


def _to_scale(claim: Claim, bound: float | None, without: float) -> float:
    """Points to fractions, ratios to logarithms."""
    if bound is None:
        return without
    return math.log(bound) if claim.is_ratio else bound / 100


def _from_scale(claim: Claim, value: float | None) -> float | None:
    if value is None:
        return None
    return math.exp(value) if claim.is_ratio else 100 * value


def _test(
    claim: Claim,
    samples: Sequence[Sample],
    found: Estimate,
    bounds: tuple[float, float],
    supports: bool,
    rng_seed: int,
) -> tuple[str | None, float | None]:
    """Name and two-sided p-value of the test that the contrast lies on its claim's bound, against where it is seen.

    Sign flips over several data sets would also reject a mean on the bound where one task lies above and another below;
    Student's t for the mean does not, and hears nothing of unlike scales. The larger of the two p-values counts.
    """
    if any(len(sample.seeds) < 2 for sample in samples) or found.seeds.degrees_of_freedom is None:
        return None, None
    flips = found.seeds.strata > 1 and not claim.is_ratio

    def one_sided(bound: float, alternative: Literal["greater", "less"]) -> float:
        by_mean = found.seeds.p_value(bound, alternative)
        assert by_mean is not None, "what varies can be tested"
        if not flips:
            return by_mean
        rng = np.random.default_rng(rng_seed)
        shifted = [np.round(sample.values - bound, 12) for sample in samples]
        blocks = blocks_of(samples)
        return max(by_mean, statistics.stratified_sign_flip_p_value(shifted, rng, alternative, blocks=blocks))

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
    claim, found = unit.claim, unit.estimate
    finding = Finding(
        cells=tuple(sample.cell for sample in unit.samples),
        seeds=tuple(len(sample.seeds) for sample in unit.samples),
        value=_from_scale(claim, found.mean),
        low=_from_scale(claim, found.low),
        high=_from_scale(claim, found.high),
        interval_over=found.interval_over,
        test=unit.test,
        p_value=unit.p_value,
        p_value_holm=p_value_holm,
        left_out=unit.left_out,
    )
    if any(len(sample.seeds) < 2 for sample in unit.samples):
        reason = "no seed-level test possible: one paired seed"
        return replace(finding, reason=reason, decided_by="two seeds at least")
    if unit.test is None:
        reason = "no test is possible: the differences are the same for all seeds"
        return replace(finding, reason=reason, decided_by="runs whose scores differ between seeds")
    assert found.low is not None and found.high is not None, "seeds that can be tested give an interval"
    low, high = unit.bounds
    within, beyond = low <= found.low and found.high <= high, found.high < low or high < found.low
    significant = p_value_holm is not None and p_value_holm <= LEVEL
    if significant and unit.supports and within:
        return replace(finding, verdict="supported")
    if significant and not unit.supports and beyond:
        return replace(finding, verdict="refuted")
    reason = "the interval reaches across the bound" if not (within or beyond) else "the test does not reject the bound"
    return replace(finding, reason=reason, decided_by=_say_needs(unit, tests))


def _say_needs(unit: _Measured, tests: int) -> str:
    """How many seeds would decide, were the contrast what it seems; or how many examples, where seeds cannot.

    For a mean at distance d from the bound, its variance over examples, which no seed lowers, and its variance over
    seeds have to fit together: ``examples_error² + deviation² / n <= (d / (z_0.975 + z_0.8))²``.
    """
    found, deviation = unit.estimate, unit.estimate.seeds.deviation
    assert deviation is not None, "what was tested has two seeds or more"
    distance = min(abs(found.mean - bound) for bound in unit.bounds if math.isfinite(bound))
    if distance <= statistics.ROUNDING:
        return "nothing, if the value lies on the bound itself"
    allowed = distance / (statistics.normal_quantile(1 - LEVEL / 2) + statistics.normal_quantile(statistics.POWER))
    if found.examples_error >= allowed:
        smallest = min(sample.examples for sample in unit.samples)
        needed = math.ceil(smallest * (found.examples_error / allowed) ** 2)
        return (
            f"more than {needed:,} evaluation examples: seeds alone cannot, the value is too close to the bound for "
            f"the variance of {smallest:,} examples"
        )
    by_test = statistics.seeds_needed(distance, deviation, found.seeds.strata)
    by_interval = math.ceil(deviation**2 / (allowed**2 - found.examples_error**2))
    if by_test is None or by_interval > statistics.MOST_SEEDS:
        return f"more than {statistics.MOST_SEEDS:,} seeds: the value is too close to the bound"
    seeds, now = max(by_test, by_interval), max(len(sample.seeds) for sample in unit.samples)
    each = " in each cell" if len(unit.samples) > 1 else ""
    if seeds <= now:
        return f"more seeds than {now}{each}: the correction over {tests} tests asks for more than one claim alone"
    power = f"power {100 * statistics.POWER:.0f} %, one claim alone"
    return f"about {seeds} seeds{each}, if the value is what it seems ({power})"


def _answer(name: str, claim: Claim, findings: tuple[Finding, ...], cells: Sequence[Cell]) -> Answer:
    if not findings:
        budgets = ", ".join(f"{budget:g} %" for budget in claim.budgets or ())
        return Answer(name, claim, "undecided", f"no runs at a budget of {budgets}", "runs at that budget", ())
    verdicts = {finding.verdict for finding in findings}
    verdict: Verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    open_ones = [finding for finding in findings if finding.verdict == verdict == "undecided"]

    def join(texts: Sequence[tuple[Finding, str | None]]) -> str | None:
        several = len(findings) > 1
        return "; ".join(f"{f.cells[0]}: {text}" if several else str(text) for f, text in texts if text) or None

    if verdict == "supported" and (missing := _find_missing_tasks(claim, findings, cells)):
        said = f"it speaks of {' and '.join(missing)} as well, of which there are no such runs"
        return Answer(name, claim, "undecided", said, f"runs on {' and '.join(missing)}", findings)
    reason = join([(finding, finding.reason) for finding in open_ones])
    return Answer(name, claim, verdict, reason, join([(f, f.decided_by) for f in open_ones]), findings)


def _find_missing_tasks(claim: Claim, findings: Sequence[Finding], cells: Sequence[Cell]) -> list[str]:
    """Tasks of the claim's own setting that nothing was measured on, where something of it was."""
    if claim.about is None:
        return []
    measured = {name for finding in findings for name in finding.cells}
    found = {claim.about.task_of(cell) for cell in cells if cell.name in measured and claim.about.holds(cell)}
    return [task for task in claim.about.tasks if task not in found] if found else []


def _with_requirement(answer: Answer, answers: Mapping[str, Answer]) -> Answer:
    """A claim whose premise is refuted is refuted; one whose premise is open is not supported yet."""
    if answer.claim.requires is None:
        return answer
    premise = answers[answer.claim.requires]
    said = f"it rests on “{premise.claim.statement}”, which is {premise.verdict}"
    if premise.verdict == "refuted":
        return replace(answer, verdict="refuted", reason=said, decided_by=None)
    if premise.verdict == "undecided" and answer.verdict == "supported":
        return replace(answer, verdict="undecided", reason=said, decided_by=premise.decided_by)
    if premise.verdict == "undecided" and answer.verdict == "undecided":
        return replace(answer, reason=f"{answer.reason}; and {said}")
    return answer
