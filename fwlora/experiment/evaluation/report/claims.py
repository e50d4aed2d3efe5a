"""Cards of claims in the report, with their findings drawn as strips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.measures import find_measure
from fwlora.experiment.evaluation.claims.verdicts import ClaimResult, Finding
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.results import Reason
from fwlora.experiment.evaluation.compare.variants import label_role
from fwlora.experiment.evaluation.output import tables
from fwlora.experiment.evaluation.report.text import typeset

STRIP_WIDTH = 280.0
_STRIP_PADDING = 0.1
_LABEL_ROOM = 26.0  # width of one number under a strip


@dataclass(frozen=True)
class Strip:
    """A finding drawn on a line of numbers; every coordinate is between 0, left, and :data:`STRIP_WIDTH`.

    Attributes:
        claimed: ends of the range that the claim allows.
        labels: coordinate, text and anchor of each number under the line: the bounds, and no difference.
        bounds: coordinates of the claim's bounds.
        neutral: coordinate of no difference.
        value: coordinate of the measured value.
        interval: ends of its interval; None where there is none.
    """

    claimed: tuple[float, float]
    labels: tuple[tuple[float, str, str], ...]
    bounds: tuple[float, ...]
    neutral: float
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class GroupedReason:
    """A sentence, and the names of all cells that it holds for; no names for one about several cells."""

    sentence: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class FindingText:
    """A finding in words.

    Attributes:
        finding: what is shown.
        text: value, interval and corrected p-value.
        value: value and interval alone.
    """

    finding: Finding
    text: str
    value: str


@dataclass(frozen=True)
class ClaimCard:
    """The text of one claim's card.

    Attributes:
        result: the claim and its verdict.
        measure: what the contrast is made of.
        contrast: the claim's weights in words.
        bound: the claim's bounds in words.
        cells: names of the evaluated cells.
        left_out: names of cells that the claim covers and that were not evaluated.
        left_out_why: the reasons.
        reasons: why it is undecided.
        remedies: what would decide it.
        elsewhere: evaluated cells outside of the claim's own model and tasks.
        measured: every finding in words.
    """

    result: ClaimResult
    measure: str
    contrast: str
    bound: str
    cells: tuple[str, ...]
    left_out: tuple[str, ...]
    left_out_why: tuple[str, ...]
    reasons: tuple[GroupedReason, ...]
    remedies: tuple[GroupedReason, ...]
    elsewhere: tuple[str, ...]
    measured: tuple[FindingText, ...]


def describe_claim(result: ClaimResult, cells: Sequence[Cell]) -> ClaimCard:
    """Put a claim's result into words."""
    claim = result.claim
    half = "low" if claim.modules == "least_important" else "high"
    names = {name for finding in result.findings for name in finding.cells}
    evaluated = [cell for cell in cells if cell.name in names]
    return ClaimCard(
        result=result,
        measure=find_measure(claim.measure).description.format(half=half),
        contrast=claim.unit.format_contrast({label_role(role): weight for role, weight in claim.contrast.items()}),
        bound=_describe_bound(claim),
        cells=tuple(cell.name for cell in evaluated),
        left_out=tuple(cell.name for cell in cells if claim.covers(cell) and cell.name not in names and names),
        left_out_why=tuple(str(reason) for finding in result.findings for reason in finding.left_out),
        reasons=tuple(group_reasons(result.reasons)),
        remedies=tuple(group_reasons(result.remedies)),
        elsewhere=tuple(cell.name for cell in evaluated if claim.about and not claim.about.contains(cell)),
        measured=tuple(
            FindingText(
                finding, format_finding(result, finding), format_finding(result, replace(finding, p_value_holm=None))
            )
            for finding in result.findings
        ),
    )


def _describe_bound(claim: Claim) -> str:
    bounds = [("at least", claim.at_least), ("at most", claim.at_most)]
    words = " and ".join(f"{word} {typeset(f'{bound:g}')}" for word, bound in bounds if bound is not None)
    return words + claim.unit.suffix


def format_finding(result: ClaimResult, finding: Finding) -> str:
    """Write a finding's value, interval and corrected p-value."""
    return re.sub(r"p ([=<]) ", "p\u00a0\\1\u00a0", typeset(tables.format_finding(result, finding)))


def group_reasons(reasons: Sequence[Reason]) -> list[GroupedReason]:
    """Group equal sentences, each with the cells that it is about."""
    sentences: dict[str, list[str]] = {}
    for reason in reasons:
        cells = sentences.setdefault(reason.text[:1].upper() + reason.text[1:], [])
        cells.extend([] if reason.cell is None else [reason.cell])
    return [GroupedReason(sentence, tuple(cells)) for sentence, cells in sentences.items()]


def scale_to_line(value: float, low: float, high: float, width: float = STRIP_WIDTH) -> float:
    """Return the coordinate of a value on a line from ``low`` to ``high``, with room at both ends."""
    span = high - low
    share = 0.5 if span <= 0 else (value - low + _STRIP_PADDING * span) / ((1 + 2 * _STRIP_PADDING) * span)
    return round(share * width, 1)


def arrange_strip(result: ClaimResult, finding: Finding) -> Strip | None:
    """Compute all coordinates of a finding's strip; all findings of a claim share one scale.

    Ratios are laid out by their logarithms.

    Returns:
        The strip; None where nothing was measured.
    """
    claim = result.claim
    if finding.value is None:
        return None
    to_axis, neutral, bounds = claim.unit.to_axis, claim.unit.neutral, claim.bounds
    values = [value for each in result.findings for value in (each.value, each.low, each.high) if value is not None]
    shown = [to_axis(value) for value in (*bounds, *values, neutral)]
    low, high = min(shown), max(shown)
    if low == high:
        low, high = low - 0.01, high + 0.01

    def at(value: float) -> float:
        return scale_to_line(to_axis(value), low, high)

    coordinates = [at(bound) for bound in bounds]
    anchors = ["middle"] * len(bounds)
    if len(coordinates) == 2 and coordinates[1] - coordinates[0] < _LABEL_ROOM:
        anchors = ["end", "start"]
    labels = [(x, typeset(f"{b:g}"), anchor) for x, b, anchor in zip(coordinates, bounds, anchors, strict=True)]
    if all(abs(at(neutral) - x) > 1.5 * _LABEL_ROOM for x in coordinates):
        labels.append((at(neutral), f"{neutral:g}", "middle"))
    return Strip(
        claimed=(
            0.0 if claim.at_least is None else at(claim.at_least),
            STRIP_WIDTH if claim.at_most is None else at(claim.at_most),
        ),
        labels=tuple(labels),
        bounds=tuple(coordinates),
        neutral=at(neutral),
        value=at(finding.value),
        interval=None if finding.low is None or finding.high is None else (at(finding.low), at(finding.high)),
    )
