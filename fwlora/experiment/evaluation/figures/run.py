"""Figures of one run: its curves, its predictions, and values of its modules."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fwlora.experiment.evaluation.compare.bootstrap import confusion_matrix
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, as_finite
from fwlora.experiment.evaluation.figures.style import (
    COLORS,
    GREY,
    Drawing,
    draw_grid,
    render,
    running_mean,
    smoothing_window,
    thin_curve,
)
from fwlora.experiment.methods import find_method
from fwlora.experiment.tracking import metrics, task_metrics

_ANNOTATED_MODULES = 200
LEARNING_CURVE_SIZE = (6.4, 5.0)  # in inches
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class _HeatMap:
    """A value per module; ``whole`` numbers get a bar of whole steps."""

    metric: str
    label: str
    caption: str
    whole: bool = False


_HEAT_MAPS = {
    "module_delta_norm": _HeatMap(
        metrics.MODULE_DELTA_NORMS, "‖ΔW‖, Frobenius norm of the update", "How far training moved each matrix"
    ),
    "module_importance": _HeatMap(
        metrics.MODULE_IMPORTANCES, "importance I", "Importance as measured during the Fisher warm-up"
    ),
    "module_rank": _HeatMap(metrics.MODULE_RANKS, "final rank", "Rank that the method left each matrix", whole=True),
}


def draw_run(run: EvaluatedRun) -> dict[str, Drawing]:
    """Draw the figures of one run by topic: learning curve, predictions, and module heat maps where recorded."""
    drawn = {
        "learning_curve": render(
            partial(_draw_learning_curve, run=run),
            *LEARNING_CURVE_SIZE,
            "Training and evaluation, final and best epoch marked",
        )
    }
    if run.has_classes:
        side = min(9.0, 2.6 + 0.7 * len(run.label_names))
        caption = "Gold against predicted classes after the last epoch"
        drawn["confusion_matrix"] = render(partial(_draw_confusion, run=run), side + 0.8, side, caption)
    else:
        caption = "Predicted against gold numbers after the last epoch"
        drawn["predictions"] = render(partial(_draw_numbers, run=run), 4.6, 4.4, caption)
    names = run.record.summary.get(metrics.MODULE_NAMES)
    for topic, kind in _HEAT_MAPS.items():
        values = run.record.summary.get(kind.metric)
        if not names or not values or all(value is None for value in values):
            continue
        if topic != "module_rank" or changes_ranks(run):
            grid, layers, projections = arrange_modules(names, values)
            width, height = 2.6 + 0.75 * len(projections), 1.5 + 0.3 * len(layers)
            draw = partial(_draw_modules, run=run, grid=grid, layers=layers, projections=projections, kind=kind)
            drawn[topic] = render(draw, max(width, 4.0), max(height, 2.6), kind.caption)
    return drawn


def changes_ranks(run: EvaluatedRun) -> bool:
    """Return whether the method moves ranks between modules while it trains."""
    spec = find_method(run.method)
    return spec is not None and spec.changes_ranks(run.run)


def history_column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read steps and values of one metric, shape ``(n,)`` each, from the rows that hold it as a finite number."""
    points = [(row[metrics.GLOBAL_STEP], as_finite(row.get(name))) for row in rows]
    kept = [(step, value) for step, value in points if value is not None]
    return np.array([step for step, _ in kept], dtype=float), np.array([value for _, value in kept], dtype=float)


def show_single_evaluation(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Scale axes to all that a metric can be if every curve is one point, which an axis of its own would magnify.

    Args:
        axes: the curves are drawn on.
        curves: steps and values, shape ``(n,)`` each.
    """
    if all(values.size < 2 for _, values in curves):
        values = np.concatenate([values for _, values in curves])
        axes.set_ylim(-1.0 if (values < 0).any() else 0.0, 1.0)
        axes.set_xlim(0.0, 1.1 * max(steps.max() for steps, _ in curves))


def arrange_modules(names: Sequence[str], values: Sequence[float]) -> tuple[np.ndarray, list[str], list[str]]:
    """Arrange module values as a layer x projection grid.

    Args:
        names: dotted; the first number in each is its layer (``bert.encoder.layer.3.attention.self.query``).
        values: one per module.

    Returns:
        Grid of shape (layers, projections), NaN where no such module is adapted; layer names; projection names, the
        shortest endings that tell them apart.
    """
    places = []
    for name in names:
        found = _LAYER.search(name)
        places.append((int(found.group(1)), name[found.end() :]) if found else (-1, name))
    layers = sorted({layer for layer, _ in places})
    projections = list(dict.fromkeys(projection for _, projection in places))
    grid = np.full((len(layers), len(projections)), np.nan)
    for (layer, projection), value in zip(places, values, strict=True):
        number = as_finite(value)
        grid[layers.index(layer), projections.index(projection)] = np.nan if number is None else number
    return grid, ["no layer" if layer < 0 else str(layer) for layer in layers], _shortest_endings(projections)


def _shortest_endings(names: Sequence[str]) -> list[str]:
    endings = []
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if sum(f".{other}".endswith(f".{ending}") for other in names) == 1 or length == len(parts):
                break
        endings.append(ending)
    return endings


def _draw_learning_curve(figure: Figure, run: EvaluatedRun) -> None:
    rows = run.record.history
    loss, score = figure.subplots(2, 1, sharex=True)
    figure.suptitle(textwrap.fill(run.run_id, 70))
    steps, values = history_column(rows, metrics.TRAIN_LOSS)
    window = smoothing_window(values.size)
    look: dict[str, Any] = {"color": COLORS[0], "alpha": 0.3 if window > 1 else 1.0, "linewidth": 0.8}
    loss.plot(*thin_curve(steps, values), label="train, each step", **look)
    if window > 1:
        smooth = thin_curve(steps, running_mean(values, window))
        loss.plot(*smooth, color=COLORS[0], label=f"train, mean of the last {window} steps")
    eval_steps, eval_loss = history_column(rows, metrics.EVAL_LOSS)
    if eval_loss.size:
        loss.plot(eval_steps, eval_loss, color=COLORS[4], marker="s", linestyle="--", label="evaluation, each epoch")
        _mark_final_and_best(loss, eval_steps, eval_loss, COLORS[4], best=int(np.argmin(eval_loss)))
    loss.set_ylabel("cross-entropy" if run.has_classes else "squared error")

    steps, values = history_column(rows, metrics.eval_name(run.primary))
    score.plot(steps, values, color=COLORS[2], marker="s", linestyle="--", label="evaluation, each epoch")
    train_steps, train_accuracy = history_column(rows, metrics.TRAIN_EPOCH_ACCURACY)
    if run.primary == task_metrics.ACCURACY and train_accuracy.size:
        score.plot(train_steps, train_accuracy, color=COLORS[0], marker="^", label="train, mean over the epoch")
    _mark_final_and_best(score, steps, values, COLORS[2], best=int(np.argmax(values)))
    show_single_evaluation(score, [(steps, values)])
    score.set_ylabel(task_metrics.display_metric(run.primary, run.num_classes))
    score.set_xlabel("optimizer step")
    warmup = [row[metrics.GLOBAL_STEP] for row in rows if as_finite(row.get(metrics.FISHER_WARMUP)) == 1]
    for axes in (loss, score):
        for step in eval_steps:
            axes.axvline(step, color=GREY, linewidth=0.5, alpha=0.5, zorder=0)
        if warmup:
            axes.axvspan(min(warmup), max(warmup), color=COLORS[5], alpha=0.2, linewidth=0, label="Fisher warm-up")
        axes.margins(x=0.08, y=0.22)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.align_ylabels()


def _mark_final_and_best(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, best: int) -> None:
    """Mark both points; the best's text goes above it and the final's below, both towards the middle of the axes."""
    final = len(values) - 1
    same = best == final
    axes.plot(steps[final], values[final], marker="o", markersize=9, markerfacecolor="none", color=color, linestyle="")
    axes.plot(steps[best], values[best], marker="*", markersize=11, color=color, linestyle="")
    text = "final and best" if same else "final"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    below: dict[str, Any] = {
        "xytext": (0, -9),
        "textcoords": "offset points",
        "ha": "right",
        "va": "top",
        "fontsize": 8,
        "bbox": box,
    }
    above = {**below, "xytext": (0, 8), "va": "bottom", "ha": "left" if steps[best] < steps[final] / 2 else "right"}
    axes.annotate(f"{text} {values[final]:.4f}", (steps[final], values[final]), **below)
    if not same:
        axes.annotate(f"best {values[best]:.4f}", (steps[best], values[best]), **above)


def _draw_confusion(figure: Figure, run: EvaluatedRun) -> None:
    num_classes = len(run.label_names)
    counts = confusion_matrix(run.labels, run.predictions, num_classes)
    totals = counts.sum(axis=1, keepdims=True)
    percent = 100.0 * np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    axes = figure.subplots()
    draw_grid(
        figure, axes, percent, matplotlib.colormaps["Blues"].resampled(64), "percent of the gold class", limits=(0, 100)
    )
    names = [textwrap.fill(name, 18) for name in run.label_names]
    rotation = 0 if num_classes < 4 else 90
    axes.set_xticks(range(num_classes), names, rotation=rotation)
    axes.set_yticks(range(num_classes), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    if num_classes <= 12:
        for row, column in np.ndindex(num_classes, num_classes):
            color = "white" if percent[row, column] > 55 else "black"
            text = f"{counts[row, column]}\n{percent[row, column]:.1f} %"
            axes.text(column, row, text, ha="center", va="center", color=color, in_layout=False)
    axes.set_aspect("equal")
    axes.set_title(textwrap.fill(run.run_id, 40) + f"\n{run.labels.size} examples, last epoch")


def _draw_numbers(figure: Figure, run: EvaluatedRun) -> None:
    axes = figure.subplots()
    # As pixels: thousands of drawn circles would make the page slow.
    look: dict[str, Any] = {"s": 10, "alpha": 0.35, "color": COLORS[0], "linewidth": 0, "rasterized": True}
    axes.scatter(run.labels, run.predictions, **look)
    ends = [float(run.labels.min()), float(run.labels.max())]
    axes.plot(ends, ends, color="black", linewidth=1.0, linestyle="--", label="predicted = gold")
    axes.set_xlabel("gold")
    axes.set_ylabel("predicted")
    axes.set_title(textwrap.fill(run.run_id, 40) + f"\n{run.labels.size} examples, last epoch")
    figure.legend(loc="outside lower center")


def _draw_modules(
    figure: Figure, run: EvaluatedRun, grid: np.ndarray, layers: list[str], projections: list[str], kind: _HeatMap
) -> None:
    axes = figure.subplots()
    colors = matplotlib.colormaps["cividis"].resampled(64)
    draw_grid(figure, axes, np.ma.masked_invalid(grid), colors, kind.label, whole=kind.whole)
    axes.set_xticks(range(len(projections)), projections, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    if grid.size <= _ANNOTATED_MODULES:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2 if np.isfinite(grid).any() else 0.0
        for row, column in np.ndindex(*grid.shape):
            value = grid[row, column]
            text = "-" if np.isnan(value) else f"{value:.0f}" if kind.whole else f"{value:.2g}"
            color = "white" if value < middle else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7, in_layout=False)
    axes.set_title(
        textwrap.fill(run.run_id, 48) + "\n" + kind.label + (" (grey: not adapted)" if np.isnan(grid).any() else "")
    )
