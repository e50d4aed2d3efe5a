"""Evaluated cells, differences and verdicts as tables for people: terminal, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from fwlora.experiment.evaluation.claims.verdicts import Answer, Finding
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.tracking import metrics

_NOTHING = "-"
_TERMINAL_WIDTH = 110
_TEXT_COLUMNS = ("cell", "method", "first", "second", "metric")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "→": r"$\rightarrow$",
}


def render_text_table(cells: Sequence[Cell]) -> str:
    """Aligned columns for a terminal, one row per method of a cell."""
    header, rows = method_rows(cells)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        padded = (
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def render_verdicts(answers: Sequence[Answer]) -> list[str]:
    """A line or two per claim, for a terminal."""
    lines = []
    for answer in answers:
        lines.append(f"{answer.verdict.upper():<9}  {answer.claim.statement}: {describe_findings(answer)}")
        text = " ".join(_explain(answer))
        lines += textwrap.wrap(text, _TERMINAL_WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 11)
    return lines


def _explain(answer: Answer) -> list[str]:
    """Why it is undecided, what would decide it, and what it leaves out, a sentence each."""
    said = [f"because {answer.reason}."] if answer.reason else []
    said += [f"Decided by: {answer.decided_by}."] if answer.decided_by else []
    return said + [f"Without {cell}." for finding in answer.findings for cell in finding.left_out]


def describe_findings(answer: Answer) -> str:
    """The measured values behind a verdict: ``+0.12 points [-0.40, +0.65], p = 0.412``, cell by cell if several."""
    if not answer.findings:
        return "not measured"
    several = len(answer.findings) > 1
    return "; ".join(
        f"{finding.cells[0]}: {format_finding(answer, finding)}" if several else format_finding(answer, finding)
        for finding in answer.findings
    )


def format_finding(answer: Answer, finding: Finding) -> str:
    """One value with its interval and corrected p-value."""
    if finding.value is None:
        return "not measured"
    number, unit = ("{:.4f}", "") if answer.claim.is_ratio else ("{:+.2f}", " points")
    text = number.format(finding.value) + unit
    if finding.low is not None and finding.high is not None:
        text += f" [{number.format(finding.low)}, {number.format(finding.high)}]"
    if finding.p_value_holm is not None:
        text += f", p = {format_p_value(finding.p_value_holm)}".replace("= <", "< ")
    return text


def render_markdown(
    answers: Sequence[Answer], cells: Sequence[Cell], statistics: Mapping[str, Any], warnings: Sequence[str]
) -> str:
    """Verdicts, the table of methods, paired differences and warnings."""
    parts = ["# Comparison"]
    if answers:
        header = ["claim", "verdict", "measured", "why, and what would decide it"]
        rows = [
            [
                answer.claim.statement,
                answer.verdict,
                describe_findings(answer),
                " ".join(_explain(answer)),
            ]
            for answer in answers
        ]
        parts += ["## Claims", _markdown_table(header, rows)]
    parts += ["## Methods", _markdown_table(*method_rows(cells))]
    if statistics["pairs"]:
        parts += ["## Paired differences (first minus second)", _markdown_table(*pair_rows(statistics))]
        parts.append(describe_statistics(statistics))
    if warnings:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in warnings)]
    return "\n\n".join(parts) + "\n"


def describe_statistics(statistics: Mapping[str, Any]) -> str:
    """How intervals and p-values in the table of differences were made."""
    return (
        f"Intervals: {statistics['confidence']:.0%} percentile bootstrap, {statistics['resamples']} resamples, over "
        "seeds and examples (examples alone for one seed). p-values: over seeds; Holm: over all pairs. MDD: the true "
        f"difference that a t-test at {statistics['level']:.0%} finds with probability {statistics['power']:.0%}."
    )


def render_latex(cells: Sequence[Cell], statistics: Mapping[str, Any]) -> str:
    """Two ``booktabs`` tables: methods, and paired differences."""
    parts = ["% needs \\usepackage{booktabs}"]
    for header, rows in (method_rows(cells), pair_rows(statistics)):
        if rows:
            escaped = [[_escape_latex(text) for text in row] for row in rows]
            frame = pandas.DataFrame(escaped, columns=[_escape_latex(name) for name in header])
            alignment = "".join("l" if name in _TEXT_COLUMNS else "r" for name in header)
            parts.append(frame.to_latex(index=False, escape=False, column_format=alignment))
    return "\n".join(parts)


def _escape_latex(text: str) -> str:
    """Text as LaTeX prints it; a hyphen before a number is a minus."""
    escaped = "".join(_LATEX.get(character, character) for character in text.replace("->", "→"))
    return re.sub(r"(?<![\w.])-(?=\d)", r"$-$", escaped)


def render_csv(cells: Sequence[Cell]) -> str:
    """One row per method of a cell: seeds, and mean and standard deviation over seeds of every metric, in full."""
    names = list(dict.fromkeys(name for cell in cells for g in cell.groups for run in g.runs for name in run.values))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["cell", "method", "primary_metric", "n", "seeds", *(f"{n}_{s}" for n in names for s in ("mean", "sd"))]
    )
    for cell in cells:
        for group in cell.groups:
            seeds = " ".join(str(run.seed) for run in group.runs)
            values = [value for name in names for value in (group.mean(name), group.standard_deviation(name))]
            cells_of_row = [cell.name, group.label, cell.primary_eval_name, len(group.runs), seeds]
            writer.writerow([*cells_of_row, *("" if value is None else value for value in values)])
    return buffer.getvalue()


def format_p_value(value: float | None) -> str:
    """Three decimals, ``<0.001`` below."""
    return _NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def method_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per method of a cell."""
    header = ["cell", "method", "n", "metric", "mean", "sd", "accuracy", "time [s]", "adapter parameters"]
    rows = [[cell.name, group.label, *_method_values(cell, group)] for cell in cells for group in cell.groups]
    return header, rows


def _method_values(cell: Cell, group: Group) -> list[str]:
    metric = cell.primary_eval_name
    start, final = group.mean(metrics.PARAMS_ADAPTER), group.mean(metrics.PARAMS_ADAPTER_FINAL)
    counts = dict.fromkeys(f"{count:.0f}" for count in (start, final) if count is not None)
    return [
        str(len(group.runs)),
        cell.primary,
        _number(group.mean(metric), 4),
        _number(group.standard_deviation(metric), 4),
        _number(group.mean("eval_accuracy"), 4),
        _number(group.mean(metrics.TRAINING_TIME_S), 1),
        " -> ".join(counts) or _NOTHING,
    ]


def pair_rows(statistics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per pair of methods in a cell."""
    header = [
        "cell",
        "first",
        "second",
        "metric",
        "seeds",
        "difference",
        "interval",
        "wins",
        "t p",
        "flip p",
        "t p (Holm)",
        "g",
        "MDD",
    ]
    adjusted = {(test["cell"], test["first"], test["second"]): test for test in statistics["holm"]["paired_t"]}
    rows = []
    for pair in statistics["pairs"]:
        names = [pair["cell"], pair["first"], pair["second"]]
        test = pair["over_seeds"].get(pair["primary_metric"])
        if test is None:
            rows.append([*names, pair["primary_metric"], "0", *[_NOTHING] * 8])
            continue
        holm = adjusted.get((names[0], names[1], names[2]), {}).get("p_value_holm")
        rows.append(
            [
                *names,
                pair["primary_metric"],
                str(test["count"]),
                f"{test['mean']:+.4f}",
                f"[{test['low']:+.4f}, {test['high']:+.4f}]",
                f"{test['wins']}/{test['count']}",
                *(format_p_value(value) for value in (test["t_p_value"], test["sign_flip_p_value"], holm)),
                _number(test["hedges_g"], 2),
                _number(test["minimum_detectable_difference"], 4),
            ]
        )
    return header, rows


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _number(value: float | None, decimals: int) -> str:
    return _NOTHING if value is None else f"{value:.{decimals}f}"
