"""The report's figures: small enough to be part of the page, each with the name of its PDF."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import Drawing


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure of the page.

    Attributes:
        caption: what it shows, in a sentence.
        svg: the picture in base64; None for a figure that is only named.
        width: in CSS pixels; None where the SVG does not say it.
        height: in CSS pixels; None likewise.
        file: name of the PDF.
        address: of the PDF, relative to the page.
    """

    caption: str
    svg: str | None
    width: int | None
    height: int | None
    file: str
    address: str


def describe_figures(figures: Figures, cells: Sequence[Cell]) -> list[tuple[str, list[EmbeddedFigure]]]:
    """List titles with their figures: over all cells, then cell by cell."""
    groups = []
    if figures.overview:
        shown = [_describe_figure(drawing, f"../{figures.name(topic)}") for topic, drawing in figures.overview.items()]
        groups.append(("Over all cells", shown))
    for cell in cells:
        drawings = figures.cells.get(cell.slug, {})
        shown = [_describe_figure(each, f"../{figures.name(topic, cell.slug)}") for topic, each in drawings.items()]
        if shown:
            groups.append((cell.name, shown))
    return groups


def describe_run_figures(figures: Figures, run_id: str) -> list[EmbeddedFigure]:
    """List the figures of a run; the confusion matrix is named only, as the page shows it as a table."""
    return [
        _describe_figure(
            drawing, f"../../{run_id}/{figures.name_of_run(run_id, topic)}", embedded=topic != "confusion_matrix"
        )
        for topic, drawing in figures.runs.get(run_id, {}).items()
    ]


def _describe_figure(drawing: Drawing, path: str, embedded: bool = True) -> EmbeddedFigure:
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', drawing.svg[:1000])
    svg = base64.b64encode(drawing.svg).decode() if embedded else None
    return EmbeddedFigure(
        caption=drawing.caption,
        svg=svg,
        width=round(float(size[1]) * 4 / 3) if size else None,
        height=round(float(size[2]) * 4 / 3) if size else None,
        file=path.rsplit("/", 1)[-1],
        address=quote(path),
    )
