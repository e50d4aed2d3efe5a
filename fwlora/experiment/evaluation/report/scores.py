"""The first screen of the report: one sentence, and who scored what, how sure, in each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fwlora.experiment.evaluation.claims.verdicts import ClaimResult
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.contrasts import Estimate
from fwlora.experiment.evaluation.compare.references import has_learned, score_constant
from fwlora.experiment.evaluation.report.claims import scale_to_line
from fwlora.experiment.evaluation.report.text import count_noun, typeset

LINE_WIDTH = 420.0
TICKS = 5
# Names of runs that did not learn in the sentence; more are counted.
SHOWN_RUNS = 3


@dataclass(frozen=True)
class ScoreRow:
    """A method's mean on the line of its cell.

    Attributes:
        label: of the method.
        text: its mean in points, interval and seeds.
        value: coordinate of the mean.
        interval: coordinates of the interval's ends; None without one.
        best: whether no other method of the cell has a higher mean.
        unlearned: runs that are no better than a constant prediction.
    """

    label: str
    text: str
    value: float
    interval: tuple[float, float] | None
    best: bool
    unlearned: int


@dataclass(frozen=True)
class ScoreLines:
    """A cell's dot plot.

    Attributes:
        cell: its name.
        metric: what is scored.
        rows: a method each, in the order of the tables.
        references: label and coordinate of what a method has to be above.
        ticks: text and coordinate.
    """

    cell: str
    metric: str
    rows: tuple[ScoreRow, ...]
    references: tuple[tuple[str, float], ...]
    ticks: tuple[tuple[str, float], ...]


def arrange_scores(cell: Cell, means: Mapping[tuple[str, str], Estimate]) -> ScoreLines:
    """Lay out the means of a cell's methods on one line each, all to one scale, in points.

    Args:
        cell: whose methods are shown.
        means: by cell and label of the method.
    """
    found = {group.label: means[cell.name, group.label] for group in cell.groups}
    constant = score_constant(cell.runs[0])
    references = {str(constant): constant.value}
    heads = [group for group in cell.groups if group.settings.get("model.lora.enabled") is False]
    references |= {group.label: found[group.label].mean for group in heads}
    ends = [value for each in found.values() for value in (each.low, each.high, each.mean) if value is not None]
    # An interval of few seeds may reach beyond what a metric can be; it is shown to that limit.
    low, high = max(-1.0, min([*ends, *references.values()])), min(1.0, max([*ends, *references.values()]))

    def at(value: float) -> float:
        return scale_to_line(min(max(value, low), high), low, high, LINE_WIDTH)

    best = max(each.mean for each in found.values())
    rows = [
        ScoreRow(
            group.label,
            _describe_mean(group, found[group.label]),
            at(found[group.label].mean),
            None if (one := found[group.label]).low is None or one.high is None else (at(one.low), at(one.high)),
            found[group.label].mean == best,
            sum(not has_learned(run) for run in group.runs),
        )
        for group in cell.groups
    ]
    ticks = [low + (high - low) * step / (TICKS - 1) for step in range(TICKS)] if high > low else [low]
    return ScoreLines(
        cell.name,
        cell.display_metric(cell.primary),
        tuple(rows),
        tuple((name, at(value)) for name, value in references.items()),
        tuple((typeset(f"{100 * tick:.1f}"), at(tick)) for tick in ticks),
    )


def write_lead(cells: Sequence[Cell], results: Sequence[ClaimResult]) -> str:
    """Write one sentence: which method scores highest where, what the verdicts are, and which runs did not learn."""
    winners = Counter(max(cell.groups, key=lambda group: _mean_of(cell, group)).label for cell in cells)
    (first, wins), *others = winners.most_common()
    where = f" in {wins} of {len(cells)} cells" if len(cells) > 1 else ""
    parts = [_join([f"{first} has the highest mean{where}", *(f"{label} in {count}" for label, count in others)])]
    tally = Counter(result.verdict for result in results)
    if tally:
        verdicts = [f"{tally[name]} {name}" for name in ("supported", "refuted", "undecided") if tally[name]]
        verdicts += [f"{tally['does not apply']} without a premise"] if tally["does not apply"] else []
        parts.append(f"of {count_noun(len(results), 'claim')}, {_join(verdicts)}")
    unlearned = [run.run_id for cell in cells for run in cell.runs if not has_learned(run)]
    if unlearned:
        more = f" and {len(unlearned) - SHOWN_RUNS} more" if len(unlearned) > SHOWN_RUNS else ""
        parts.append(f"{count_noun(len(unlearned), 'run')} did not learn: {', '.join(unlearned[:SHOWN_RUNS])}{more}")
    return f"{'; '.join(parts)}."


def _describe_mean(group: Group, found: Estimate) -> str:
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" [{100 * max(found.low, -1.0):.1f}, {100 * min(found.high, 1.0):.1f}]"
    return typeset(f"{100 * found.mean:.1f}{interval}, {count_noun(len(group.runs), 'seed')}")


def _mean_of(cell: Cell, group: Group) -> float:
    return group.mean(cell.primary_eval_name) or 0.0


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
