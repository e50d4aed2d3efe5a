"""Claims against runs: supported, refuted or undecided, with interval and test, and what would decide it.

The rule. A claim is decided only where both sources of variance agree: the interval (over seeds and examples, for
quality) lies wholly on one side of the claim's bound, and a test over seeds rejects the bound in the same direction, at
5 % after Holm's correction over all claims' tests. Runs of one data set and seed count as one observation, whatever
their budgets. On one data set the test is Student's paired t; over several, stratified sign flips for quality, whose
scales differ, and Student's t with Satterthwaite's degrees of freedom for ratios. Runs that differ in more than the
method decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fwlora.experiment.evaluation import statistics
from fwlora.experiment.evaluation.cells import ROLE_NAMES, Cell, Group, Role, budget_value
from fwlora.experiment.evaluation.claims import Claim
from fwlora.experiment.evaluation.comparability import find_unequal_settings
from fwlora.experiment.evaluation.contrasts import (
    Estimate,
    Sample,
    Terms,
    Unmeasured,
    blocks_of,
    estimate,
    sample_cost,
    sample_quality,
    sample_update_norm,
)
from fwlora.experiment.evaluation.resampling import ResampledRuns
from fwlora.experiment.evaluation.statistics import LEVEL

Verdict = Literal["supported", "refuted", "undecided"]
NORMAL_QUANTILE = 1.959963984540054
_STRENGTH_SETTINGS = ("fw_lora.lambda_fw", "fw_lora.warmup_steps", "fw_lora.allocation")


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
        left_out: cells that the claim speaks of and that could not be measured, each with the reason.
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
        name: [_measure(name, claim, group, resampled, rng_seed) for group in _split_cells(claim, cells)]
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
            _conclude(unit, holm.get(id(unit))) if isinstance(unit, _Measured) else unit for unit in measured[name]
        ]
        answers[name] = _answer(name, claim, tuple(findings))
    return [_with_requirement(answer, answers) for answer in answers.values()]


def _split_cells(claim: Claim, cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells that the claim speaks of: one by one, or all together."""
    wanted = [cell for cell in cells if claim.budgets is None or _budget_percent(cell) in claim.budgets]
    if claim.scope == "each_cell":
        return [[cell] for cell in wanted]
    return [wanted] if wanted else []


def _budget_percent(cell: Cell) -> float | None:
    return budget_value(cell.budget) if cell.budget.endswith("%") else None


def _measure(
    name: str, claim: Claim, cells: Sequence[Cell], resampled: ResampledRuns, rng_seed: int
) -> _Measured | Finding:
    samples, reasons = [], []
    for cell in cells:
        try:
            samples.append(_sample(claim, cell, resampled))
        except Unmeasured as reason:
            reasons.append(f"{cell.name}: {reason}")
    if not samples:
        return Finding(
            cells=tuple(cell.name for cell in cells),
            reason="; ".join(reasons),
            decided_by="such runs, with equal settings and the same seeds, two at least",
        )
    found = estimate(samples, rng_seed, name)
    bounds = tuple(_to_scale(claim, bound) for bound in (claim.at_least, claim.at_most))
    low, high = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
    supports = low < found.mean < high or ((low == found.mean or found.mean == high) and claim.is_ratio)
    test, p_value = _test(claim, samples, found, (low, high), rng_seed)
    return _Measured(claim, tuple(samples), found, (low, high), supports, p_value, test, tuple(reasons))


def _sample(claim: Claim, cell: Cell, resampled: ResampledRuns) -> Sample:
    terms: Terms = [(weight, _choose_group(cell, role)) for role, weight in claim.contrast.items()]
    groups = [group for _, group in terms]
    unequal = find_unequal_settings(groups)
    if unequal:
        raise Unmeasured(f"its runs differ in more than the method ({'; '.join(unequal)})")
    if "control" in claim.contrast:
        for key in _STRENGTH_SETTINGS:
            if len({group.settings.get(key) for group in groups}) > 1:
                values = ", ".join(f"{group.settings.get(key)} for {group.label}" for group in groups)
                raise Unmeasured(f"the control's {key} is not the method's ({values})")
    if claim.measure == "quality":
        return sample_quality(cell, terms, resampled)
    if claim.measure == "training_time":
        return sample_cost(cell, terms)
    assert claim.modules is not None, "checked when the claim was read"
    return sample_update_norm(cell, terms, claim.modules)


def _choose_group(cell: Cell, role: Role) -> Group:
    groups = [group for group in cell.groups if group.role == role]
    if role == "proposed" and len(groups) > 1:
        # The claims speak of the specification's own variant.
        groups = [
            group
            for group in groups
            if group.settings.get("fw_lora.importance", '"sum"') == '"sum"'
            and group.settings.get("fw_lora.allocation", '"shrink"') == '"shrink"'
        ]
    if not groups:
        raise Unmeasured(f"no runs of {ROLE_NAMES.get(role, role)}")
    if len(groups) > 1:
        raise Unmeasured(f"several variants of {ROLE_NAMES.get(role, role)}; evaluate one of them at a time")
    return groups[0]


def _to_scale(claim: Claim, bound: float | None) -> float | None:
    """Points to fractions, ratios to logarithms."""
    if bound is None:
        return None
    return math.log(bound) if claim.is_ratio else bound / 100


def _from_scale(claim: Claim, value: float | None) -> float | None:
    if value is None:
        return None
    return math.exp(value) if claim.is_ratio else 100 * value


def _test(
    claim: Claim, samples: Sequence[Sample], found: Estimate, bounds: tuple[float, float], rng_seed: int
) -> tuple[str | None, float | None]:
    """Name and two-sided p-value of the test that the contrast lies on its claim's bound (the harder of two)."""
    if any(len(sample.seeds) < 2 for sample in samples):
        return None, None
    flips = found.strata > 1 and not claim.is_ratio

    def one_sided(bound: float, alternative: Literal["greater", "less"]) -> float | None:
        if math.isinf(bound):
            return 0.0
        if not flips:
            return found.seeds.p_value(bound, alternative)
        rng = np.random.default_rng(rng_seed)
        shifted = [sample.values - bound for sample in samples]
        return statistics.stratified_sign_flip_p_value(shifted, rng, alternative, blocks=blocks_of(samples))

    inside = [one_sided(bounds[0], "greater"), one_sided(bounds[1], "less")]
    outside = [one_sided(bounds[0], "less")] if math.isfinite(bounds[0]) else []
    outside += [one_sided(bounds[1], "greater")] if math.isfinite(bounds[1]) else []
    known = [p for p in (*inside, *outside) if p is not None]
    if len(known) < len(inside) + len(outside):
        return None, None  # differences that do not vary over seeds
    name = "stratified sign flips" if flips else "paired t" if found.strata == 1 else "stratified paired t"
    supporting, refuting = max(p for p in inside if p is not None), min(p for p in outside if p is not None)
    return name, min(1.0, 2 * min(supporting, refuting))


def _conclude(unit: _Measured, p_value_holm: float | None) -> Finding:
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
    if unit.test is None:
        single = any(len(sample.seeds) < 2 for sample in unit.samples)
        reason = "no seed-level test possible: one paired seed" if single else "the seeds do not differ at all"
        return replace(finding, reason=reason, decided_by=_say_needs(unit) if not single else "two seeds at least")
    assert found.low is not None and found.high is not None, "seeds that can be tested give an interval"
    low, high = unit.bounds
    within, beyond = low <= found.low and found.high <= high, found.high < low or high < found.low
    significant = p_value_holm is not None and p_value_holm <= LEVEL
    if significant and unit.supports and within:
        return replace(finding, verdict="supported")
    if significant and not unit.supports and beyond:
        return replace(finding, verdict="refuted")
    reason = "the interval reaches across the bound" if not (within or beyond) else "the test does not reject the bound"
    return replace(finding, reason=reason, decided_by=_say_needs(unit))


def _say_needs(unit: _Measured) -> str:
    """How many seeds would decide, were the contrast what it seems; or how many examples, where seeds cannot."""
    found = unit.estimate
    distance = min(abs(found.mean - bound) for bound in unit.bounds if math.isfinite(bound))
    limit = NORMAL_QUANTILE * found.examples_error
    if distance == 0:
        return "nothing, if the value lies on the bound itself"
    if limit >= distance:
        smallest = min(sample.examples for sample in unit.samples)
        needed = math.ceil(smallest * (limit / distance) ** 2)
        return (
            f"about {needed:,} evaluation examples: seeds alone cannot, the value is too close to the bound for the "
            f"variance of {smallest:,} examples"
        )
    seeds = statistics.seeds_needed(distance, found.deviation, found.strata)
    if seeds is None:
        return f"more than {statistics.MOST_SEEDS:,} seeds: the value is too close to the bound"
    each = " in each cell" if len(unit.samples) > 1 else ""
    now = max(len(sample.seeds) for sample in unit.samples)
    if seeds <= now:
        return f"more seeds than {now}{each}: these would do without the correction for several claims"
    return f"about {seeds} seeds{each}, if the value is what it seems (power {statistics.POWER:.0%}, one claim alone)"


def _answer(name: str, claim: Claim, findings: tuple[Finding, ...]) -> Answer:
    if not findings:
        budgets = ", ".join(f"{budget:g} %" for budget in claim.budgets or ())
        return Answer(name, claim, "undecided", f"no runs at a budget of {budgets}", "runs at that budget", ())
    verdicts = {finding.verdict for finding in findings}
    verdict: Verdict = "refuted" if "refuted" in verdicts else "undecided" if "undecided" in verdicts else "supported"
    open_ones = [finding for finding in findings if finding.verdict == verdict == "undecided"]

    def join(texts: Sequence[tuple[Finding, str | None]]) -> str | None:
        several = len(findings) > 1
        return "; ".join(f"{f.cells[0]}: {text}" if several else str(text) for f, text in texts if text) or None

    reason = join([(finding, finding.reason) for finding in open_ones])
    return Answer(name, claim, verdict, reason, join([(f, f.decided_by) for f in open_ones]), findings)


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
    return answer
