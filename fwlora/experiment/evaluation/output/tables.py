"""Tables of cells, differences and verdicts: for the terminal, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
import unicodedata
from collections.abc import Sequence

import pandas

from fwlora.experiment.evaluation.claims.verdicts import ClaimResult, Finding, group_undecided, join_reasons
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.results import Comparison, ComparisonWarning
from fwlora.experiment.evaluation.output.score_table import NOTHING, arrange_scores, format_mean, score_rows
from fwlora.experiment.tracking import metrics, task_metrics

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_TERMINAL_WIDTH = 110
_TEXT_COLUMNS = ("budget", "task", "cell", "method", "first", "second", "metric")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
}


def render_text_table(cells: Sequence[Cell]) -> str:
    """Align columns for a terminal, one row per method of a cell."""
    header, rows = method_rows(cells)
    widths = [max(_count_columns(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        padded = []
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - _count_columns(text))
            padded.append(text + space if column < 2 else space + text)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _count_columns(text: str) -> int:
    """Count the columns that a terminal shows a text in: two for a wide character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def render_verdicts(results: Sequence[ClaimResult]) -> list[str]:
    """Write each claim's verdict, values and reasons for a terminal."""
    lines = []
    for result in results:
        lines.append(f"{result.verdict.upper():<9}  {result.claim.statement}: {describe_findings(result)}")
        grouped = result.verdict == "undecided"
        lines += _wrap(_remark(result) if grouped else _explain(result))
    for why, remedy, claims in group_undecided(results):
        count = f"{len(claims)} of {len(results)} claims {'is' if len(claims) == 1 else 'are'} undecided"
        lines += _wrap([f"{count} because {why}." + (f" Decided by: {remedy}." if remedy else "")], indent=0)
    return lines


def _wrap(sentences: Sequence[str], indent: int = 11) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(" ".join(sentences), _TERMINAL_WIDTH, initial_indent=margin, subsequent_indent=margin)


def _explain(result: ClaimResult) -> list[str]:
    """List why it is undecided, what would decide it, and what is left out, a sentence each."""
    sentences = [f"because {join_reasons(result.reasons)}."] if result.reasons else []
    sentences += [f"Decided by: {join_reasons(result.remedies)}."] if result.remedies else []
    return sentences + _remark(result)


def _remark(result: ClaimResult) -> list[str]:
    """List what is left out, and what a decision rests on, a sentence each."""
    sentences = [f"Without {left_out}." for finding in result.findings for left_out in finding.left_out]
    return sentences + [f"Caveat: {finding.caveat}." for finding in result.findings if finding.caveat]


def describe_findings(result: ClaimResult) -> str:
    """Write the values of a verdict: ``+0.12 points [-0.40, +0.65], p = 0.412``, cell by cell if there are several."""
    if not result.findings:
        return "not measured"
    several = len(result.findings) > 1
    return "; ".join(
        f"{finding.cells[0]}: {format_finding(result, finding)}" if several else format_finding(result, finding)
        for finding in result.findings
    )


def format_finding(result: ClaimResult, finding: Finding) -> str:
    """Write one value with its interval and corrected p-value."""
    if finding.value is None:
        return "not measured"
    unit = result.claim.unit
    text = unit.format(finding.value) + unit.suffix
    if finding.low is not None and finding.high is not None:
        text += f" [{unit.format(finding.low)}, {unit.format(finding.high)}]"
    if finding.p_value_holm is not None:
        text += f", p = {format_p_value(finding.p_value_holm)}".replace("= <", "< ")
    return text


def render_markdown(
    results: Sequence[ClaimResult],
    cells: Sequence[Cell],
    comparison: Comparison,
    warnings: Sequence[ComparisonWarning],
) -> str:
    """Write verdicts, scores as in papers, the table of methods, paired differences and warnings."""
    parts = ["# Comparison"]
    if results:
        header = ["claim", "verdict", "measured", "why, and what would decide it"]
        rows = [
            [
                result.claim.statement,
                result.verdict,
                describe_findings(result),
                " ".join(_explain(result)),
            ]
            for result in results
        ]
        parts += ["## Claims", _markdown_table(header, rows)]
    parts.append("## Scores")
    for table in arrange_scores(cells):
        header, blocks = score_rows(table, lambda text, is_best: f"**{text}**" if is_best else text)
        parts += [
            f"{_escape_markdown(table.caption)}.",
            _markdown_table(header, [row for block in blocks for row in block]),
        ]
    parts += ["## Methods", _markdown_table(*method_rows(cells))]
    if comparison.pairs:
        parts += ["## Paired differences (first minus second)", _markdown_table(*pair_rows(comparison, cells))]
        parts.append(explain_intervals(comparison))
    if warnings:
        parts += ["## Warnings", "\n".join(f"- {_escape_markdown(str(warning))}" for warning in warnings)]
    return "\n\n".join(parts) + "\n"


def explain_intervals(comparison: Comparison) -> str:
    """Explain how intervals and p-values in the table of differences were computed."""
    return (
        f"Intervals: {comparison.confidence:.0%}, Student's t over seeds joined with a bootstrap of "
        f"{comparison.resamples} resamples over examples (the bootstrap alone for one seed; two seeds give t "
        "one degree of freedom, and say little). p-values: over seeds; Holm: over all pairs. MDD: the true "
        f"difference that a t-test at {comparison.level:.0%} finds with probability {comparison.power:.0%}."
    )


def render_latex(cells: Sequence[Cell], comparison: Comparison) -> str:
    """Write ``booktabs`` tables: scores as in papers, methods, and paired differences."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in arrange_scores(cells):
        header, blocks = score_rows(table, _mark_latex)
        parts += [f"% {' '.join(table.caption.split())}", _latex_table(header, blocks)]
    for header, rows in (method_rows(cells), pair_rows(comparison, cells)):
        if rows:
            escaped = [[_escape_latex(text) for text in row] for row in rows]
            parts.append(_latex_table([_escape_latex(name) for name in header], [escaped]))
    return "\n".join(parts)


def _latex_table(header: Sequence[str], blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    """Write a table of LaTeX texts, with a rule between blocks of rows."""
    frame = pandas.DataFrame([row for block in blocks for row in block], columns=list(header))
    alignment = "".join("l" if name in _TEXT_COLUMNS else "r" for name in header)
    lines = frame.to_latex(index=False, escape=False, column_format=alignment).split("\n")
    place = lines.index("\\midrule")
    for block in blocks[:-1]:
        place += len(block) + 1
        lines.insert(place, "\\midrule")
    return "\n".join(lines)


def _mark_latex(text: str, is_best: bool) -> str:
    escaped = _escape_latex(text)
    return rf"\textbf{{{escaped}}}" if is_best else escaped


def _escape_latex(text: str) -> str:
    """Escape text for LaTeX; a hyphen before a number becomes a minus."""
    escaped = "".join(_LATEX.get(character, character) for character in text.replace("->", "→"))
    return re.sub(r"(?<![\w.])-(?=\d)", r"$-$", escaped)


def render_csv(cells: Sequence[Cell]) -> str:
    """Write a row per method of a cell: seeds, and unrounded mean and standard deviation of every metric."""
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
            texts = [_as_text(text) for text in (cell.name, group.label, cell.primary_eval_name)]
            cells_of_row = [*texts, len(group.runs), _as_text(seeds)]
            writer.writerow([*cells_of_row, *("" if value is None else value for value in values)])
    return buffer.getvalue()


def format_p_value(value: float | None) -> str:
    """Write three decimals, ``<0.001`` for smaller values, a dash for None."""
    return NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def method_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the header, and one row per method of a cell."""
    header = ["cell", "method", "n", "metric", "score [points]", "accuracy [points]", "time [s]", "adapter parameters"]
    rows = [[cell.name, group.label, *_method_values(cell, group)] for cell in cells for group in cell.groups]
    groups = [group for cell in cells for group in cell.groups]
    if any(group.values(metrics.EVAL_ECE) for group in groups):  # older programs recorded no logits
        header += ["NLL", "ECE"]
        names = (metrics.EVAL_LOSS, metrics.EVAL_ECE)
        for row, group in zip(rows, groups, strict=True):
            row += [_number(group.mean(name), 4) for name in names]
    return header, rows


def _method_values(cell: Cell, group: Group) -> list[str]:
    metric = cell.primary_eval_name
    start, final = group.mean(metrics.PARAMS_ADAPTER), group.mean(metrics.PARAMS_ADAPTER_FINAL)
    counts = dict.fromkeys(f"{count:.0f}" for count in (start, final) if count is not None)
    return [
        str(len(group.runs)),
        cell.display_metric(cell.primary, short=True),
        format_mean(group, metric, 100),
        format_mean(group, metrics.eval_name(task_metrics.ACCURACY), 100),
        _number(group.mean(metrics.TRAINING_TIME_S), 1),
        " -> ".join(counts) or NOTHING,
    ]


def pair_rows(comparison: Comparison, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the header, and one row per pair of methods in a cell."""
    by_name = {cell.name: cell for cell in cells}
    header = [
        "cell",
        "first",
        "second",
        "metric",
        "seeds",
        "difference [points]",
        "interval [points]",
        "wins",
        "t p",
        "flip p",
        "t p (Holm)",
        "g",
        "MDD [points]",
    ]
    rows = []
    for pair in comparison.pairs:
        metric = by_name[pair.cell].display_metric(pair.primary_metric, short=True)
        names = [pair.cell, pair.first, pair.second, metric]
        if pair.primary is None:
            rows.append([*names, "0", *[NOTHING] * 8])
            continue
        tests = pair.primary.tests
        rows.append(
            [
                *names,
                str(tests.count),
                f"{100 * tests.mean:+.2f}",
                f"[{100 * pair.primary.low:+.2f}, {100 * pair.primary.high:+.2f}]",
                f"{tests.wins}/{tests.count}",
                *(format_p_value(value) for value in (tests.t_p_value, tests.sign_flip_p_value, pair.t_p_value_holm)),
                _number(tests.hedges_g, 2),
                _number(tests.minimum_detectable_difference, 2, factor=100.0),
            ]
        )
    return header, rows


def _as_text(text: str) -> str:
    """Keep spreadsheets from taking a text for a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _escape_markdown(text: str) -> str:
    """Escape what Markdown passes on as HTML, and write a text on one line."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_escape_markdown(text).replace("|", "\\|") for text in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, decimals: int, factor: float = 1.0) -> str:
    return NOTHING if value is None else f"{factor * value:.{decimals}f}"
