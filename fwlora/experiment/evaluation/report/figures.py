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
        shown = [_describe_figure(drawing, figures.name(topic)) for topic, drawing in figures.overview.items()]
        groups.append(("Over all cells", shown))
    for cell in cells:
        drawings = figures.cells.get(cell.condition, {})
        shown = [_describe_figure(each, figures.name(topic, cell.condition)) for topic, each in drawings.items()]
        if shown:
            groups.append((cell.name, shown))
    return groups


def describe_run_figures(figures: Figures, run_id: str) -> list[EmbeddedFigure]:
    """List the figures of a run; the confusion matrix is named only, as the page shows it as a table."""
    return [
        _describe_figure(
            drawing, f"../{run_id}/{figures.name_of_run(run_id, topic)}", embedded=topic != "confusion_matrix"
        )
        for topic, drawing in figures.runs.get(run_id, {}).items()
    ]


def _describe_figure(drawing: Drawing, path: str, embedded: bool = True) -> EmbeddedFigure:
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', drawing.svg[:1000])
    svg = base64.b64encode(compact_svg(drawing.svg).encode()).decode() if embedded else None
    return EmbeddedFigure(
        caption=drawing.caption,
        svg=svg,
        width=round(float(size[1]) * 4 / 3) if size else None,
        height=round(float(size[2]) * 4 / 3) if size else None,
        file=path.rsplit("/", 1)[-1],
        address=quote(path),
    )


def compact_svg(svg: bytes) -> str:
    """The same picture in half the text: places to a hundredth of a point, short names, no metadata, no indentation."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' d="([^"]*)"', lambda found: f' d="{_compact_path(found[1])}"', text)
    text = re.sub(r' style="[^"]*"', lambda found: found[0].replace("; ", ";").replace(": ", ":"), text)
    text = re.sub(r"translate\([^)]*\)", lambda found: re.sub(r"-?\d+\.\d+", _shorten_number, found[0]), text)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href").replace("DejaVuSans-", "d")
    return re.sub(r">\s+<", "><", text)


def _compact_path(path: str) -> str:
    short = re.sub(r"-?\d+\.\d+", _shorten_number, " ".join(path.split()))
    short = re.sub(r"\s*([A-Za-z])\s*", r"\1", short)
    # A closed rectangle, which heat maps hold by the hundred.
    return re.sub(r"^M(\S+) (\S+)L(\S+) \2L\3 (\S+)L\1 \4(?:z|L\1 \2z?)$", r"M\1 \2H\3V\4H\1z", short)


def _shorten_number(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
