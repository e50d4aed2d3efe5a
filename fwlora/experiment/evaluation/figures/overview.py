"""Figures over several cells: quality against budget, and the pooled differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.results import Comparison, PooledComparison
from fwlora.experiment.evaluation.figures.style import COLORS, GREY, Drawing, add_legend, render, style_groups


def draw_overview(cells: Sequence[Cell], comparison: Comparison) -> dict[str, Drawing]:
    """Draw figures by topic; quality against budget for every data set and model with two budgets or more."""
    drawn: dict[str, Drawing] = {}
    pooled = [entry for entry in comparison.pooled if len(entry.cells) > 1]
    if pooled:
        draw = partial(_draw_pooled, pooled=pooled)
        caption = "Mean difference over all cells, every cell counting alike, with 95 % intervals"
        drawn["pooled_difference"] = render(draw, 6.4, 1.2 + 0.9 * len(pooled), caption)
    series: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.budget.percent is not None:
            series.setdefault((cell.data, cell.model), []).append(cell)
    rows = [members for members in series.values() if len(members) > 1]
    if rows:
        draw = partial(_draw_budgets, rows=rows)
        drawn["quality_budget"] = render(draw, 4.2 * len(rows) + 0.6, 4.2, "Quality against parameter budget")
    return drawn


def _draw_pooled(figure: Figure, pooled: Sequence[PooledComparison]) -> None:
    all_axes = np.atleast_1d(figure.subplots(len(pooled), 1))
    for axes, entry in zip(all_axes, pooled, strict=True):
        mean, low, high = (100 * value for value in (entry.mean, entry.low, entry.high))
        reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar(mean, 0.0, xerr=reach, fmt="D", capsize=4, linewidth=2, color=COLORS[0])
        axes.axvline(0.0, color="black", linewidth=1.0, linestyle="--")
        label = (
            f"{entry.first} minus {entry.second}\n{mean:+.2f} [{low:+.2f}, {high:+.2f}], {len(entry.cells)} cells, "
            f"{entry.pairs} pairs"
        )
        axes.set_yticks([0.0], [label])
        axes.set_ylim(0.6, -0.6)
    over = " / ".join(sorted({entry.interval_over for entry in pooled}))
    scales = "; each pair has its own scale" if len(pooled) > 1 else ""
    figure.supxlabel(f"difference in points of the primary metric,\n95 % interval over {over}{scales}")


def _draw_budgets(figure: Figure, rows: Sequence[Sequence[Cell]]) -> None:
    handles: dict[str, Line2D] = {}
    for axes, cells in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        budgets = [cell.budget.number for cell in cells]
        labels = list(dict.fromkeys(group.label for cell in cells for group in cell.groups))
        first = {group.label: group for cell in reversed(cells) for group in cell.groups}
        styles = style_groups([first[label] for label in labels])
        for offset, label in zip(np.linspace(-0.02, 0.02, len(labels)), labels, strict=True):
            found = [(b, c, g) for b, c in zip(budgets, cells, strict=True) for g in c.groups if g.label == label]
            places = [budget * (1 + offset) for budget, _, _ in found]
            means = [group.mean(cell.primary_eval_name) for _, cell, group in found]
            axes.plot(places, means, markersize=6, **styles[label])
            for place, (_, cell, group) in zip(places, found, strict=True):
                values = group.values(cell.primary_eval_name)
                if len(values) > 1:
                    axes.plot([place] * len(values), values, ".", color=styles[label]["color"], markersize=3, alpha=0.7)
            handles.setdefault(label, Line2D([], [], label=label, **styles[label]))
        axes.set_xscale("log")
        axes.set_xticks(budgets, [str(cell.budget) for cell in cells])
        axes.minorticks_off()
        axes.set_xlabel("adapter parameters, of the encoder's")
        axes.set_ylabel(f"{cells[0].display_metric(cells[0].primary)}, last epoch")
        axes.set_title(f"{cells[0].data}, {cells[0].model}")
        axes.margins(0.1)
    several = any(len(group.runs) > 1 for cells in rows for cell in cells for group in cell.groups)
    if several:
        handles["seeds"] = Line2D([], [], color=GREY, marker=".", linestyle="", label="one seed")
    add_legend(figure, list(handles.values()), columns=4)
