"""The evaluation as one self-contained HTML file: verdicts, tables, figures, every run, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.verdicts import group_undecided
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.results import Comparison, ComparisonWarning, PairComparison
from fwlora.experiment.evaluation.compare.runs import CALIBRATION_BINS
from fwlora.experiment.evaluation.compare.variants import UNREGISTERED_ROLE
from fwlora.experiment.evaluation.evidence import Evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import MARKERS, style_groups
from fwlora.experiment.evaluation.output import score_table, tables
from fwlora.experiment.evaluation.output.score_table import ScoreTable
from fwlora.experiment.evaluation.report.claims import (
    STRIP_WIDTH,
    ClaimCard,
    arrange_strip,
    describe_claim,
    scale_to_line,
)
from fwlora.experiment.evaluation.report.figures import EmbeddedFigure, describe_figures, describe_run_figures
from fwlora.experiment.evaluation.report.runs import (
    Commands,
    FactTable,
    RunPage,
    collect_commands,
    collect_facts,
    describe_environment_facts,
    describe_run_page,
    is_dirty,
)
from fwlora.experiment.evaluation.report.scores import (
    LINE_WIDTH,
    ScoreLines,
    arrange_scores,
    write_lead,
)
from fwlora.experiment.evaluation.report.text import (
    count_noun,
    format_number,
    format_p_value,
    format_points,
    mean_and_deviation,
    name_anchors,
    sort_value,
    split_name,
    typeset,
)
from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.methods import Variant
from fwlora.experiment.tracking import metrics, task_metrics

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ReportOrigin:
    """What made the report.

    Attributes:
        command: the evaluation's command as typed.
        environment: of the machine that evaluated; see :mod:`fwlora.experiment.tracking.environment`.
    """

    command: str
    environment: JsonMapping


@dataclass(frozen=True)
class MarkerStyle:
    """Color of a method, and the number of its marker, as in the figures."""

    color: str
    marker: int


@dataclass(frozen=True)
class CellPages:
    """The pages of all runs of a cell, each with its figures."""

    cell: Cell
    runs: tuple[tuple[RunPage, tuple[EmbeddedFigure, ...]], ...]


@dataclass(frozen=True)
class ReportPage:
    """Every value that ``page.html.jinja`` reads."""

    css: Markup
    javascript: Markup
    strip_width: float
    methods: list[str]
    summary: str
    lead: str
    scores: list[ScoreLines]
    line_width: float
    undecided: list[tuple[str, str, list[str]]]
    cells: Sequence[Cell]
    comparison: Comparison
    claim_cards: list[ClaimCard]
    claim_anchors: Mapping[str, str]
    claims: Mapping[str, Claim]
    tally: Mapping[str, int]
    warnings: Mapping[str | None, list[str]]
    warning_count: int
    anchors: Mapping[str, str]
    styles: Mapping[str, Mapping[str, MarkerStyle]]
    ranges: Mapping[str, tuple[float, float]]
    score_tables: list[ScoreTable]
    with_calibration: bool
    calibration_bins: int
    by_name: Mapping[str, Cell]
    single_seeds: list[PairComparison]
    how_to_read: str
    figures: list[tuple[str, list[EmbeddedFigure]]]
    run_pages: list[CellPages]
    facts: list[FactTable]
    dirty: int
    sources: list[tuple[str, str, str]]
    commands: Commands
    made_by: ReportOrigin
    evaluated_with: list[tuple[str, str]]


def render_report(evidence: Evidence, figures: Figures, made_by: ReportOrigin) -> bytes:
    """Render the whole report as UTF-8 HTML; equal input gives equal bytes.

    Args:
        evidence: what the runs show.
        figures: drawn from the same evidence.
        made_by: what evaluated the runs.
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
    environment.globals.update(
        scale_to_line=scale_to_line,
        mean_and_deviation=mean_and_deviation,
        metrics=metrics,
        strip=arrange_strip,
        display_metric=task_metrics.display_metric,
    )
    template = environment.get_template("page.html.jinja")
    page = template.render(vars(_collect(evidence, figures, made_by)))
    return (page.rstrip() + "\n").encode()


def _collect(evidence: Evidence, figures: Figures, made_by: ReportOrigin) -> ReportPage:
    cells, comparison, results = evidence.cells, evidence.comparison, evidence.claim_results
    runs = [run for cell in cells for run in cell.runs]
    return ReportPage(
        css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        javascript=Markup((_FOLDER / "report.js").read_text(encoding="utf-8")),
        strip_width=STRIP_WIDTH,
        methods=_name_methods(cells),
        summary=_summarize(cells),
        lead=write_lead(cells, results),
        scores=[arrange_scores(cell, evidence.means) for cell in cells],
        line_width=LINE_WIDTH,
        undecided=group_undecided(results),
        cells=cells,
        comparison=comparison,
        claim_cards=[describe_claim(result, cells) for result in results],
        claim_anchors=name_anchors("claim", [result.claim_id for result in results]),
        claims={result.claim_id: result.claim for result in results},
        tally={
            name: sum(result.verdict == name for result in results)
            for name in ("supported", "refuted", "undecided", "does not apply")
            if name != "does not apply" or any(result.verdict == name for result in results)
        },
        warnings=_group_warnings(evidence.warnings),
        warning_count=len(evidence.warnings),
        anchors=name_anchors("run", [run.run_id for run in runs]),
        styles={cell.name: _describe_styles(cell) for cell in cells},
        ranges={cell.name: _find_range(cell.read(run) for run in cell.runs) for cell in cells},
        score_tables=score_table.arrange_scores(cells),
        with_calibration=any(metrics.EVAL_ECE in run.values for run in runs),
        calibration_bins=CALIBRATION_BINS,
        by_name={cell.name: cell for cell in cells},
        single_seeds=[pair for pair in comparison.pairs if len(pair.seeds) == 1],
        how_to_read=tables.explain_intervals(comparison),
        figures=describe_figures(figures, cells),
        run_pages=[CellPages(cell, tuple(_describe_runs(cell, figures))) for cell in cells],
        facts=collect_facts(runs),
        dirty=sum(is_dirty(run) for run in evidence.runs),
        sources=[(run.run_id, run.record.state, run.record.place or run.record.source) for run in runs],
        commands=collect_commands(runs),
        made_by=made_by,
        evaluated_with=describe_environment_facts(made_by.environment),
    )


def _describe_runs(cell: Cell, figures: Figures) -> Iterable[tuple[RunPage, tuple[EmbeddedFigure, ...]]]:
    for group in cell.groups:
        for run in group.runs:
            yield describe_run_page(cell, group, run), tuple(describe_run_figures(figures, run.run_id))


def _name_methods(cells: Sequence[Cell]) -> list[str]:
    """List methods without the settings that tell their variants apart, the proposed method first."""
    variants = {group.variant for cell in cells for group in cell.groups}
    sides = ("proposed", "control", "baseline")

    def order(variant: Variant) -> tuple[int, bool, int, str]:
        return sides.index(variant.side), variant.role == UNREGISTERED_ROLE, -variant.style, variant.label

    return list(dict.fromkeys(variant.label for variant in sorted(variants, key=order)))


def _summarize(cells: Sequence[Cell]) -> str:
    counts = sorted({len(group.runs) for cell in cells for group in cell.groups})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    parts = [
        count_noun(sum(len(cell.runs) for cell in cells), "run"),
        count_noun(len(_name_methods(cells)), "method"),
        f"{seeds} {'seed' if counts[-1] == 1 else 'seeds'}" + (" each" if len(_name_methods(cells)) > 1 else ""),
        count_noun(len(cells), "cell"),
    ]
    return ", ".join(parts)


def _group_warnings(warnings: Sequence[ComparisonWarning]) -> dict[str | None, list[str]]:
    grouped: dict[str | None, list[str]] = {}
    for warning in warnings:
        grouped.setdefault(warning.cell, []).append(warning.text)
    return grouped


def _describe_styles(cell: Cell) -> dict[str, MarkerStyle]:
    styles = style_groups(cell.groups)
    return {label: MarkerStyle(style["color"], MARKERS.index(style["marker"])) for label, style in styles.items()}


def _find_range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return (min(known), max(known)) if known else (0.0, 0.0)
