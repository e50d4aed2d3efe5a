"""Style of all figures. A figure is drawn once and saved as PDF, for papers, and as SVG, for the report."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fwlora.experiment.evaluation.compare.cells import Group
from fwlora.experiment.evaluation.compare.variants import UNREGISTERED_STYLE
from fwlora.experiment.evaluation.figures.font import font_families

# Okabe and Ito's colors, which stay apart for color-blind readers; yellow is left out, it vanishes in print.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#666666"
MISSING = "#DDDDDD"
_LEGEND_ENTRY_INCH, _LEGEND_LETTER_INCH = 0.5, 0.065
MAX_POINTS = 1_000  # of a curve: a page holds many

_STYLE: Any = {
    "pdf.fonttype": 42,
    "pdf.compression": 6,
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.titlesize": 9,
    "figure.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "path.simplify": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "fwlora",
}
# Omit dates and creator so that output is byte-identical across runs of one matplotlib version.
_NO_PDF_METADATA = {"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None}
_NO_SVG_METADATA = {"Date": None, "Creator": None}


@dataclass(frozen=True)
class Drawing:
    """One figure in both forms, with a caption of one sentence."""

    pdf: bytes
    svg: bytes
    caption: str


def render(draw: Callable[[Figure], None], width: float, height: float, caption: str) -> Drawing:
    """Draw on a new figure and save it in both forms: as vectors, with embedded TrueType fonts, and without dates.

    Args:
        draw: draws on the figure.
        width: in inches.
        height: in inches.
        caption: what the figure shows.
    """
    contents = {}
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The evaluation says it once, see font.find_missing_characters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"font.family": font_families()})
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        draw(figure)
        for form, metadata in (("pdf", _NO_PDF_METADATA), ("svg", _NO_SVG_METADATA)):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, metadata=metadata)
            figure.set_layout_engine("none")  # laid out once; the second form keeps it
            contents[form] = buffer.getvalue()
    return Drawing(contents["pdf"], contents["svg"], caption)


def draw_grid(
    figure: Figure,
    axes: Axes,
    grid: np.ndarray,
    colors: Colormap,
    label: str,
    limits: tuple[float, float] | None = None,
    whole: bool = False,
) -> None:
    """Draw a heat map with its color bar, first row on top, as vectors, which stay sharp when enlarged.

    Args:
        figure: that the axes belong to.
        axes: to draw on.
        grid: values, shape (rows, columns).
        colors: from low to high.
        label: what the colors mean.
        limits: values of the first and the last color; None: the lowest and the highest.
        whole: whether the values are whole numbers.
    """
    rows, columns = grid.shape
    low, high = limits or (None, None)
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, grid, cmap=colors, vmin=low, vmax=high, edgecolors="face", linewidth=0.2)
    axes.set_facecolor(MISSING)  # shows through masked cells
    axes.set_ylim(rows - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=axes, label=label, ticks=MaxNLocator(integer=True) if whole else None)
    assert bar.solids is not None, "it belongs to a mesh"
    bar.solids.set_rasterized(False)
    bar.solids.set_edgecolor("face")


def style_groups(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Choose color, marker and line style by label: every figure shows a method alike, variants take free styles."""
    styles: dict[str, dict[str, Any]] = {}
    taken: list[int] = []
    for group in groups:
        own = group.variant.style % len(COLORS)
        candidates = (own, *range(UNREGISTERED_STYLE + 1, len(COLORS)), *range(own))
        style = next((each for each in candidates if each not in taken), len(taken) % len(COLORS))
        taken.append(style)
        styles[group.label] = {"color": COLORS[style], "marker": MARKERS[style], "linestyle": LINE_STYLES[style]}
    return styles


def add_legend(figure: Figure, handles: Sequence[Line2D], columns: int = 3) -> None:
    """Add a legend below the axes.

    Args:
        figure: that it belongs to.
        handles: entries, with labels.
        columns: at most; fewer where labels are too long for the figure's width.
    """
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = int(figure.get_figwidth() / (_LEGEND_ENTRY_INCH + _LEGEND_LETTER_INCH * longest))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=max(1, min(columns, fitting)))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with up to ``window - 1`` values before it; the shape stays ``(n,)``."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def smoothing_window(count: int) -> int:
    """Return a fiftieth of the number of points, at least 1."""
    return max(1, count // 50)


def thin_curve(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most ``most`` points: the lowest and the highest of each section."""
    if values.size <= most:
        return steps, values
    kept = []
    for stretch in np.array_split(np.arange(values.size), most // 2):
        kept += sorted({stretch[0] + int(np.argmin(values[stretch])), stretch[0] + int(np.argmax(values[stretch]))})
    return steps[kept], values[kept]
