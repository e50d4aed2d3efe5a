"""Figures that compare the methods of one cell; intervals come from the comparison, curves are averaged here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.results import Comparison, PairComparison
from fwlora.experiment.evaluation.figures.run import history_column, show_single_evaluation
from fwlora.experiment.evaluation.figures.style import (
    COLORS,
    GREY,
    Drawing,
    add_legend,
    render,
    running_mean,
    smoothing_window,
    style_groups,
    thin_curve,
)
from fwlora.experiment.tracking import metrics, task_metrics

_LABEL_WIDTH = 24
_ROW_HEIGHT_INCH = 0.24
_AXIS_HEIGHT_INCH = 0.4
_ROWS_PER_TEXT_LINE = 0.58


def draw_cell(cell: Cell, comparison: Comparison) -> dict[str, Drawing]:
    """Draw the figures of one cell.

    Args:
        cell: to be drawn.
        comparison: of all cells.

    Returns:
        Figures by topic.
    """
    pairs = [pair for pair in comparison.pairs if pair.cell == cell.name and pair.seeds]
    longest = max(len(line) for group in cell.groups for line in _wrap(group.label).split("\n"))
    width = max(4.2, 1.2 + len(cell.groups) * max(1.2, 0.075 * longest))
    drawn: dict[str, Drawing] = {}
    if pairs:
        panels = [_arrange_differences(cell, pair) for pair in pairs]
        height = sum(_ROW_HEIGHT_INCH * panel.height + _AXIS_HEIGHT_INCH for panel in panels)
        draw = partial(_draw_differences, cell=cell, pairs=pairs, panels=panels)
        caption = "Paired differences with 95 % intervals; right of the dashed line the first method is better"
        drawn["paired_difference"] = render(draw, 6.4, 1.3 + height, caption)
    for metric in dict.fromkeys((cell.primary, task_metrics.shown_beside(cell.primary))):
        shown: dict[str, Any] = {
            "metric": metrics.eval_name(metric),
            "label": f"{cell.display_metric(metric)}, last epoch",
        }
        name = cell.display_metric(metric)
        draw = partial(_draw_bars, cell=cell, decimals=4, **shown)
        drawn[f"{metric}_bar_chart"] = render(draw, width, 3.8, f"Mean {name} after the last epoch")
        if any(len(group.runs) > 1 for group in cell.groups):
            draw = partial(_draw_boxes, cell=cell, **shown)
            drawn[f"{metric}_box_plot"] = render(draw, width, 3.8, f"Spread of {name} over seeds, one point each")
    shown = {"metric": metrics.TRAINING_TIME_S, "label": "training time [s]"}
    draw = partial(_draw_bars, cell=cell, decimals=1, **shown)
    drawn["training_time_bar_chart"] = render(draw, width, 3.8, "Training time without evaluation, search and loading")
    draw = partial(_draw_time, cell=cell)
    drawn["quality_time"] = render(draw, 5.6, 3.6 + 0.2 * len(cell.groups), "Quality against training time, each run")
    draw = partial(_draw_curves, cell=cell)
    drawn["learning_curves"] = render(draw, 7.2, 3.4 + 0.2 * len(cell.groups), "Learning curves, mean over seeds")
    return drawn


def _wrap(label: str, width: int = _LABEL_WIDTH) -> str:
    """Break before a variant's brackets and between its settings, never inside a setting."""
    lines = label.replace(" (", "\n(").replace(", ", ",\n").split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


def _spread(count: int) -> np.ndarray:
    """Return offsets that keep the points of several seeds apart."""
    return np.linspace(-0.14, 0.14, count) if count > 1 else np.zeros(1)


def _label_methods(axes: Axes, cell: Cell, title: str) -> None:
    labels = [f"{_wrap(group.label)}\nn = {len(group.runs)}" for group in cell.groups]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_title(textwrap.fill(title, 60))


def _draw_bars(figure: Figure, *, cell: Cell, metric: str, label: str, decimals: int) -> None:
    styles = style_groups(cell.groups)
    axes = figure.subplots()
    several = any(len(group.runs) > 1 for group in cell.groups)
    for position, group in enumerate(cell.groups):
        values, mean = np.array(group.values(metric)), group.mean(metric)
        deviation = group.standard_deviation(metric)
        assert mean is not None, "every compared metric is checked before anything is drawn"
        axes.bar(position, mean, width=0.62, color=styles[group.label]["color"], alpha=0.75, zorder=1)
        if deviation is not None:
            axes.errorbar(position, mean, yerr=deviation, color="black", capsize=4, linewidth=1.2, zorder=3)
        if several:
            points = position + _spread(values.size)
            axes.scatter(points, values, s=16, facecolor="white", edgecolor="black", linewidth=0.8, zorder=4)
        top = max([0.0, mean + (deviation or 0.0), *values])
        axes.annotate(
            f"{mean:.{decimals}f}", (position, top), xytext=(0, 5), textcoords="offset points", ha="center", va="bottom"
        )
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.margins(y=0.14)
    axes.set_ylabel(label)
    _label_methods(axes, cell, cell.name)
    handles: list[Any] = []
    if several:
        handles.append(Line2D([], [], color="black", marker="_", markersize=8, label="± 1 sd over seeds"))
        look: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": "black", "linestyle": ""}
        handles.append(Line2D([], [], label="one seed", **look))
    title = "bar: mean over seeds" if several else "bar: one run, no seed variance"
    add_legend(figure, [Line2D([], [], color=GREY, linewidth=6, alpha=0.75, label=title), *handles])


def _draw_boxes(figure: Figure, *, cell: Cell, metric: str, label: str) -> None:
    styles = style_groups(cell.groups)
    axes = figure.subplots()
    for position, group in enumerate(cell.groups):
        values, look = np.array(group.values(metric)), styles[group.label]
        if values.size > 1:
            boxes = axes.boxplot(
                [values], positions=[position], widths=0.5, patch_artist=True, showfliers=False, manage_ticks=False
            )
            for box in boxes["boxes"]:
                box.set(facecolor=look["color"], alpha=0.5)
            for line in boxes["medians"]:
                line.set(color="black", linewidth=1.6)
        points = position + _spread(values.size)
        axes.scatter(points, values, s=20, color=look["color"], marker=look["marker"], edgecolor="black", zorder=3)
        axes.annotate(
            f"{np.median(values):.4f}",
            (position, values.max()),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
    axes.margins(y=0.18)
    axes.set_ylabel(label)
    _label_methods(axes, cell, cell.name)
    handles = [
        Line2D([], [], color="black", linewidth=1.6, label="median (written above)"),
        Line2D([], [], color=GREY, linewidth=6, alpha=0.5, label="quartiles"),
        Line2D([], [], color=GREY, marker="o", markeredgecolor="black", linestyle="", label="one seed"),
    ]
    add_legend(figure, handles)


def _draw_time(figure: Figure, cell: Cell) -> None:
    styles = style_groups(cell.groups)
    axes = figure.subplots()
    handles = []
    for group in cell.groups:
        look = styles[group.label]
        points: dict[str, Any] = {"color": look["color"], "marker": look["marker"], "linestyle": ""}
        times, values = group.values(metrics.TRAINING_TIME_S), group.values(cell.primary_eval_name)
        axes.plot(times, values, markersize=4, alpha=0.6, **points)
        time, quality = float(np.mean(times)), float(np.mean(values))
        axes.plot([time], [quality], markersize=10, markeredgecolor="black", **points)
        handles.append(Line2D([], [], label=f"{group.label}: {quality:.4f} in {time:.1f} s", **points))
    mark: dict[str, Any] = {"color": GREY, "marker": "o", "linestyle": ""}
    handles.append(Line2D([], [], markersize=10, markeredgecolor="black", label="mean", **mark))
    handles.append(Line2D([], [], markersize=4, label="one run", **mark))
    axes.margins(0.12)
    axes.set_xlabel("training time [s]")
    axes.set_ylabel(f"{cell.display_metric(cell.primary)}, last epoch")
    axes.set_title(textwrap.fill(cell.name, 60))
    add_legend(figure, handles, columns=1 if len(cell.groups) > 3 else 2)


def _draw_curves(figure: Figure, cell: Cell) -> None:
    styles = style_groups(cell.groups)
    loss, score = figure.subplots(1, 2)
    figure.suptitle(cell.name)
    handles = []
    for group in cell.groups:
        look = styles[group.label]
        bare = {key: look[key] for key in ("color", "linestyle")}
        curves = [history_column(run.record.history, metrics.TRAIN_LOSS) for run in group.runs]
        steps, values = _mean_curve(curves)
        loss.plot(*thin_curve(steps, running_mean(values, smoothing_window(values.size))), **bare)
        curves = [history_column(run.record.history, cell.primary_eval_name) for run in group.runs]
        if len(curves) > 1:
            for curve in curves:
                score.plot(*curve, color=look["color"], linewidth=0.6, alpha=0.5)
        steps, values = _mean_curve(curves)
        best = int(np.argmax(values))
        score.plot(steps, values, markersize=4, **look)
        score.plot(steps[-1], values[-1], marker="o", markersize=10, markerfacecolor="none", color=look["color"])
        score.plot(steps[best], values[best], marker="*", markersize=10, color=look["color"], linestyle="")
        text = f"{group.label}: final {values[-1]:.4f}, best {values[best]:.4f}"
        handles.append(Line2D([], [], label=text, **look))
    loss.set_ylabel("train loss, running mean")
    score.set_ylabel(cell.display_metric(cell.primary))
    score.margins(x=0.08, y=0.1)
    show_single_evaluation(score, [history_column(run.record.history, cell.primary_eval_name) for run in cell.runs])
    for axes in (loss, score):
        axes.set_xlabel("optimizer step")
    marks: dict[str, Any] = {"color": GREY, "linestyle": ""}
    handles.append(Line2D([], [], marker="o", markersize=9, markerfacecolor="none", label="final (compared)", **marks))
    handles.append(Line2D([], [], marker="*", markersize=9, label="best (never compared)", **marks))
    add_legend(figure, handles, columns=1 if len(cell.groups) > 3 else 2)


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Average runs at the steps that all have; return the first run's curve where they share none."""
    by_step = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    shared = sorted(set.intersection(*(set(values) for values in by_step))) or sorted(by_step[0])
    rows = [[values[step] for step in shared] for values in by_step if set(shared) <= set(values)]
    return np.array(shared), np.mean(rows, axis=0)


@dataclass(frozen=True)
class _DifferenceRow:
    """One interval of the difference figure, in points; ``kind`` is ``baseline``, ``control`` or ``seed``."""

    position: float
    label: str
    kind: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class _DifferencePanel:
    """The rows of one pair, from top to bottom, and their height in rows."""

    rows: tuple[_DifferenceRow, ...]
    height: float


def _arrange_differences(cell: Cell, pair: PairComparison) -> _DifferencePanel:
    """Place a pair's rows with room for their labels."""
    overall = pair.primary
    assert overall is not None, "only pairs with seeds are drawn"
    mean, low, high = (100 * value for value in (overall.tests.mean, overall.low, overall.high))
    names = "\nminus ".join(_wrap(label, 36) for label in (pair.first, pair.second))
    label = f"{names}\n{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    half = _ROWS_PER_TEXT_LINE * (label.count("\n") + 1) / 2 + 0.2
    rows = [_DifferenceRow(half, label, pair.second_is, mean, low, high)]
    position = 2 * half
    for seed in pair.per_seed if len(pair.seeds) > 1 else ():
        one = seed.intervals[cell.primary]
        values = (100 * value for value in (one.difference, one.low, one.high))
        rows.append(_DifferenceRow(position + 0.3, f"seed {seed.seed}", "seed", *values))
        position += 1.0
    return _DifferencePanel(tuple(rows), position)


def _draw_differences(
    figure: Figure, cell: Cell, pairs: Sequence[PairComparison], panels: Sequence[_DifferencePanel]
) -> None:
    """Draw a panel per pair, each with an axis of its own: one weak method would flatten an axis that all share."""
    all_axes = np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=[panel.height for panel in panels]))
    colors = {"baseline": COLORS[0], "control": COLORS[4], "seed": GREY}
    for axes, panel in zip(all_axes, panels, strict=True):
        for row in panel.rows:
            look: dict[str, Any] = {"fmt": "D", "capsize": 4, "linewidth": 2}
            if row.kind == "seed":
                look = {"fmt": "o", "capsize": 2, "linewidth": 0.8, "markersize": 4}
            # Rounding can put a degenerate interval's end past its estimate by one unit in the last place.
            reach = [[max(0.0, row.difference - row.low)], [max(0.0, row.high - row.difference)]]
            axes.errorbar(row.difference, row.position, xerr=reach, color=colors[row.kind], **look)
        axes.axvline(0.0, color="black", linewidth=1.0, linestyle="--")
        axes.set_yticks([row.position for row in panel.rows], [row.label for row in panel.rows])
        axes.set_ylim(panel.height, 0.0)
    name = cell.display_metric(cell.primary)
    scales = "\neach pair has its own scale" if len(panels) > 1 else ""
    figure.supxlabel(f"difference in {name}, in points, 95 % interval{scales}")
    all_axes[0].set_title(textwrap.fill(cell.name, 60))
    several = any(len(pair.seeds) > 1 for pair in pairs)
    over = "mean over seeds, interval over seeds and examples" if several else "one seed, interval over examples only"
    handles = [Line2D([], [], color=COLORS[0], marker="D", linewidth=2, label=over)]
    if any(pair.second_is == "control" for pair in pairs):
        control = next(group.variant.label for group in cell.groups if group.is_control)
        handles.append(Line2D([], [], color=COLORS[4], marker="D", linewidth=2, label=f"against {control}"))
    if several:
        text = "one seed, interval over examples"
        handles.append(Line2D([], [], color=GREY, marker="o", markersize=4, linewidth=0.8, label=text))
    add_legend(figure, handles, columns=1)
