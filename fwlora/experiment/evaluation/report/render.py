"""The evaluation as one HTML file that needs nothing beside it: verdicts, tables, figures, every run, provenance."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fwlora.experiment.evaluation.claims.verdicts import Answer, Finding
from fwlora.experiment.evaluation.compare.cells import ROLE_NAMES, Cell, Group
from fwlora.experiment.evaluation.evidence import Evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import MARKERS, display_metric, style_groups
from fwlora.experiment.evaluation.output import tables
from fwlora.experiment.evaluation.report.figures import describe_figures, describe_run_figures
from fwlora.experiment.evaluation.report.runs import (
    collect_commands,
    collect_facts,
    describe_environment_facts,
    describe_run_page,
    is_dirty,
)
from fwlora.experiment.tracking import metrics

STRIP_WIDTH = 280.0
_STRIP_PADDING = 0.1
_LABEL_ROOM = 26.0  # that one number under a strip takes
_FOLDER = Path(__file__).parent
_MEASURES = {
    "quality": "difference of the primary metric in points",
    "training_time": "ratio of training times",
    "update_norm": "ratio of the norms of updates, geometric mean over the modules of {half} importance",
}


@dataclass(frozen=True)
class ReportOrigin:
    """What made the report.

    Attributes:
        command: the evaluation's command as typed.
        environment: of the machine that evaluated; see :mod:`fwlora.experiment.tracking.environment`.
    """

    command: str
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Strip:
    """A finding drawn as a line of numbers; all places are from 0, left, to :data:`STRIP_WIDTH`.

    Attributes:
        claimed: the stretch that the claim allows.
        labels: place, text and anchor of the numbers under the line: the bounds, and no difference.
        bounds: the claim's.
        neutral: where there is no difference.
        value: None where it was not measured.
        interval: None where there is none.
    """

    claimed: tuple[float, float]
    labels: tuple[tuple[float, str, str], ...]
    bounds: tuple[float, ...]
    neutral: float
    value: float | None
    interval: tuple[float, float] | None


def render_report(evidence: Evidence, figures: Figures, made_by: ReportOrigin) -> bytes:
    """The whole report as UTF-8 HTML; equal input gives equal bytes.

    Args:
        evidence: what the runs show.
        figures: drawn from the same evidence.
        made_by: who and what evaluated.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        typeset=typeset,
        split_name=split_name,
        points=format_points,
        number=format_number,
        p_value=format_p_value,
        sort_value=sort_value,
    )
    environment.globals.update(place=place, mean_and_deviation=mean_and_deviation, metrics=metrics, strip=arrange_strip)
    template = environment.get_template("page.html.jinja")
    page = template.render(_collect(evidence, figures, made_by))
    return (page.rstrip() + "\n").encode()


def typeset(text: Any) -> str:
    """With a true minus before numbers, a curved apostrophe, and per cent that does not leave its number."""
    signed = re.sub(r"(?<![\w.-])-(?=\d)", "−", str(text))
    return re.sub(r"(?<=\d) ?%", "\u00a0%", re.sub(r"(?<=\w)'(?=\w)", "’", signed))


def split_name(name: str) -> Markup:
    """A cell's name that breaks between its parts alone."""
    parts = [Markup('<span class="part">{}</span>').format(typeset(part)) for part in name.split(", ")]
    return Markup(", ").join(parts)


def format_points(value: float | None, signed: bool = False) -> str:
    """A fraction in points; a dash where there is none."""
    return "–" if value is None else typeset(f"{100 * value:{'+' if signed else ''}.2f}")


def format_number(value: Any, pattern: str = "{:,.0f}") -> str:
    """A dash where there is none."""
    return "–" if value is None else typeset(pattern.format(value))


def format_p_value(value: float | None, name: str = "") -> str:
    """``0.412``, ``< 0.001``; with a name ``p = 0.412``, ``p < 0.001``."""
    if value is None:
        return "–"
    text = tables.format_p_value(value).replace("<", "<\u00a0")
    return text if not name else f"{name}\u00a0{text}" if text.startswith("<") else f"{name}\u00a0=\u00a0{text}"


def sort_value(value: float | None) -> str:
    """What a column is sorted by, in full precision; what is missing sorts last."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def mean_and_deviation(group: Group, metric: str, factor: float = 1.0, decimals: int = 2) -> str:
    """``93.12 ± 0.35``; the mean alone for one run."""
    mean, deviation = group.mean(metric), group.standard_deviation(metric)
    if mean is None:
        return "–"
    text = f"{factor * mean:,.{decimals}f}" + ("" if deviation is None else f" ± {factor * deviation:,.{decimals}f}")
    return typeset(text)


def place(value: float, low: float, high: float, width: float = STRIP_WIDTH) -> float:
    """Where a value goes on a line from ``low`` to ``high``, with room at both ends."""
    span = high - low
    share = 0.5 if span <= 0 else (value - low + _STRIP_PADDING * span) / ((1 + 2 * _STRIP_PADDING) * span)
    return round(share * width, 1)


def arrange_strip(answer: Answer, finding: Finding) -> Strip | None:
    """None where nothing was measured. Ratios are laid out by their logarithms, all findings on one scale."""
    claim = answer.claim
    if finding.value is None:
        return None
    to_line = math.log if claim.is_ratio else float
    neutral = 1.0 if claim.is_ratio else 0.0
    bounds = [bound for bound in (claim.at_least, claim.at_most) if bound is not None]
    ends = [] if finding.low is None or finding.high is None else [finding.low, finding.high]
    found = [value for each in answer.findings for value in (each.value, each.low, each.high) if value is not None]
    shown = [to_line(value) for value in (*bounds, *found, neutral)]
    low, high = min(shown), max(shown)
    if low == high:
        low, high = low - 0.01, high + 0.01

    def at(value: float) -> float:
        return place(to_line(value), low, high)

    places = [at(bound) for bound in bounds]
    anchors = ["middle"] * len(bounds)
    if len(places) == 2 and places[1] - places[0] < _LABEL_ROOM:
        anchors = ["end", "start"]
    labels = [(x, typeset(f"{b:g}"), anchor) for x, b, anchor in zip(places, bounds, anchors, strict=True)]
    if all(abs(at(neutral) - x) > 1.5 * _LABEL_ROOM for x in places):
        labels.append((at(neutral), f"{neutral:g}", "middle"))
    return Strip(
        claimed=(
            0.0 if claim.at_least is None else at(claim.at_least),
            STRIP_WIDTH if claim.at_most is None else at(claim.at_most),
        ),
        labels=tuple(labels),
        bounds=tuple(places),
        neutral=at(neutral),
        value=at(finding.value),
        interval=(at(ends[0]), at(ends[1])) if ends else None,
    )


def _collect(evidence: Evidence, figures: Figures, made_by: ReportOrigin) -> dict[str, Any]:
    """Everything that the template names."""
    cells = evidence.cells
    anchors = name_anchors("run", [run.run_id for cell in cells for run in cell.runs])
    claim_anchors = name_anchors("claim", [answer.claim_id for answer in evidence.answers])
    return {
        "css": Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        "javascript": Markup((_FOLDER / "report.js").read_text(encoding="utf-8")),
        "strip_width": STRIP_WIDTH,
        "methods": _name_methods(cells),
        "summary": _summarise(cells),
        "cells": cells,
        "statistics": evidence.statistics,
        "answers": [_describe_answer(answer, cells) for answer in evidence.answers],
        "claim_anchors": claim_anchors,
        "claims": {answer.claim_id: answer.claim for answer in evidence.answers},
        "tally": {
            name: sum(each.verdict == name for each in evidence.answers)
            for name in ("supported", "refuted", "undecided")
        },
        "warnings": _group_warnings(evidence.warnings, cells),
        "warning_count": len(evidence.warnings),
        "anchors": anchors,
        "styles": {cell.name: _describe_styles(cell) for cell in cells},
        "ranges": {cell.name: _find_range(cell.read(run) for run in cell.runs) for cell in cells},
        "display_metric": display_metric,
        "pairs": _describe_pairs(evidence.statistics),
        "pair_range": _find_range(_pair_ends(evidence.statistics)),
        "single_seeds": [pair for pair in evidence.statistics["pairs"] if len(pair["seeds"]) == 1],
        "how_to_read": tables.describe_statistics(evidence.statistics),
        "figures": describe_figures(figures, cells),
        "run_pages": [
            {
                "cell": cell,
                "runs": [
                    {**describe_run_page(cell, group, run), "figures": describe_run_figures(figures, run.run_id)}
                    for group in cell.groups
                    for run in group.runs
                ],
            }
            for cell in cells
        ],
        "facts": collect_facts([run for cell in cells for run in cell.runs]),
        "dirty": sum(is_dirty(run) for run in evidence.runs),
        "sources": [(run.run_id, run.record.state, run.record.source) for cell in cells for run in cell.runs],
        "commands": collect_commands([run for cell in cells for run in cell.runs]),
        "made_by": made_by,
        "evaluated_with": describe_environment_facts(made_by.environment),
    }


def name_anchors(prefix: str, names: Sequence[str]) -> dict[str, str]:
    """An id for each name that HTML and addresses take as it is."""
    anchors: dict[str, str] = {}
    for name in names:
        plain = f"{prefix}-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        candidates = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        anchors[name] = next(candidate for candidate in candidates if candidate not in anchors.values())
    return anchors


def _name_methods(cells: Sequence[Cell]) -> list[str]:
    """Without the settings that tell variants of one method apart; the proposed method first."""
    groups = {(group.role, ROLE_NAMES.get(group.role, group.runs[0].method)) for cell in cells for group in cell.groups}
    order = ("proposed", "control", "adalora", "lora", "other")
    return list(dict.fromkeys(name for _, name in sorted(groups, key=lambda each: (order.index(each[0]), each[1]))))


def _summarise(cells: Sequence[Cell]) -> str:
    counts = sorted({len(group.runs) for cell in cells for group in cell.groups})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    parts = [
        _count(sum(len(cell.runs) for cell in cells), "run"),
        _count(len(_name_methods(cells)), "method"),
        f"{seeds} {'seed' if counts[-1] == 1 else 'seeds'}" + (" each" if len(_name_methods(cells)) > 1 else ""),
        _count(len(cells), "cell"),
    ]
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _describe_answer(answer: Answer, cells: Sequence[Cell]) -> dict[str, Any]:
    claim = answer.claim
    half = "low" if claim.modules == "least_important" else "high"
    bounds = [("at least", claim.at_least), ("at most", claim.at_most)]
    names = {name for finding in answer.findings for name in finding.cells}
    evaluated = [cell for cell in cells if cell.name in names]
    weights = [(weight, ROLE_NAMES.get(role, role)) for role, weight in claim.contrast.items()]
    signs = [
        ("−" if weight < 0 else "+", f"{abs(weight):g} × " if abs(weight) != 1 else "", n) for weight, n in weights
    ]
    words = " ".join(f"{sign} {size}{name}" for sign, size, name in signs).removeprefix("+ ")
    if claim.is_ratio:
        words = " / ".join(name for _, name in weights) if [w for w, _ in weights] == [1, -1] else f"exp({words})"
    return {
        "answer": answer,
        "measure": _MEASURES[claim.measure].format(half=half),
        "contrast": words,
        "bound": " and ".join(f"{word} {typeset(f'{b:g}')}" for word, b in bounds if b is not None)
        + ("" if claim.is_ratio else " points"),
        "cells": [cell.name for cell in evaluated],
        "left_out": [cell.name for cell in cells if claim.speaks_of(cell) and cell.name not in names and names],
        "left_out_why": [why for finding in answer.findings for why in finding.left_out],
        "why": split_reasons(answer.reason, cells),
        "needs": split_reasons(answer.decided_by, cells),
        "elsewhere": [cell.name for cell in evaluated if claim.about and not claim.about.holds(cell)],
        "measured": [
            {
                "finding": finding,
                "text": _format_finding(answer, finding),
                "value": _format_finding(answer, replace(finding, p_value_holm=None)),
            }
            for finding in answer.findings
        ],
    }


def _format_finding(answer: Answer, finding: Finding) -> str:
    return re.sub(r"p ([=<]) ", "p\u00a0\\1\u00a0", typeset(tables.format_finding(answer, finding)))


def split_reasons(text: str | None, cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """Sentences with the cells that each speaks of, none where it names none; equal ones are said once."""
    names = "|".join(re.escape(cell.name) for cell in sorted(cells, key=lambda cell: -len(cell.name)))
    sentences: dict[str, list[str]] = {}
    for part in re.split(rf"; (?=(?:{names}): )", text) if text else []:
        found = re.fullmatch(rf"({names}): (.*)", part, re.DOTALL)
        sentence = found[2] if found else part
        sentences.setdefault(sentence[:1].upper() + sentence[1:], []).extend([found[1]] if found else [])
    return list(sentences.items())


def _group_warnings(warnings: Sequence[str], cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    grouped: dict[str, list[str]] = {}
    for warning in warnings:
        name = next((cell.name for cell in cells if warning.startswith(f"{cell.name}: ")), "")
        grouped.setdefault(name, []).append(warning.removeprefix(f"{name}: ") if name else warning)
    return list(grouped.items())


def _describe_styles(cell: Cell) -> dict[str, dict[str, Any]]:
    """Colour and number of the marker by label, as in the figures."""
    styles = style_groups(cell.groups)
    return {
        label: {"colour": style["color"], "marker": MARKERS.index(style["marker"])} for label, style in styles.items()
    }


def _find_range(values: Iterable[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)


def _pair_ends(statistics: Mapping[str, Any]) -> list[float | None]:
    tests = [pair["over_seeds"].get(pair["primary_metric"]) for pair in statistics["pairs"]]
    return [0.0, *(test[key] for test in tests if test for key in ("low", "high", "mean"))]


def _describe_pairs(statistics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every pair with its test on the primary metric and with p-values corrected by Holm."""
    holm = statistics["holm"]
    by_pair = {(test["cell"], test["first"], test["second"]): test["p_value_holm"] for test in holm["paired_t"]}
    by_seed = {
        (test["cell"], test["first"], test["second"], test["seed"]): test["p_value_holm"] for test in holm["mcnemar"]
    }
    described = []
    for pair in statistics["pairs"]:
        key = (pair["cell"], pair["first"], pair["second"])
        seeds = [{**seed, "mcnemar_holm": by_seed[(*key, seed["seed"])]} for seed in pair["per_seed"]]
        test = pair["over_seeds"].get(pair["primary_metric"])
        time = {**dict.fromkeys(("ratio", "low", "high", "reason")), **(pair.get("training_time_ratio") or {})}
        described.append({**pair, "test": test, "holm": by_pair.get(key), "time": time, "per_seed": seeds})
    return described
