"""What figures show, read back from their artists; that files are vector, embeddable and reproducible."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.comparisons import compare_pairs
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.figures import cell as cell_figures
from fwlora.experiment.evaluation.figures import draw as drawing
from fwlora.experiment.evaluation.figures import overview as overview_figures
from fwlora.experiment.evaluation.figures import run as run_figures
from fwlora.experiment.evaluation.figures import style as figure_style
from fwlora.experiment.evaluation.figures.draw import Figures, draw_figures
from fwlora.experiment.evaluation.figures.font import find_missing_characters
from fwlora.experiment.tracking import metrics
from tests.helpers import evaluation_records as records
from tests.helpers.paths import HELPERS, REPOSITORY

RECORDS_FILE = HELPERS / "evaluation_records.py"
make_record = records.make_record


def cells_of(*given):
    return group_cells(read_runs(given))


def compare(cells):
    return compare_pairs(cells, resample_runs([run for cell in cells for run in cell.runs], 0, 100), 0)


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_running_mean_of_a_hand_computed_case():
    np.testing.assert_allclose(figure_style.running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2), [2, 3, 5, 7])
    np.testing.assert_allclose(figure_style.running_mean(np.array([2.0, 4.0, 6.0]), 1), [2, 4, 6])


def test_modules_are_arranged_by_layer_and_shortest_distinct_name():
    names = [
        "bert.encoder.layer.10.attention.self.query",
        "bert.encoder.layer.2.attention.self.query",
        "bert.encoder.layer.2.attention.output.dense",
        "bert.encoder.layer.2.output.dense",
        "pooler",
    ]
    grid, layers, projections = run_figures.arrange_modules(names, [1.0, 2.0, 3.0, 4.0, float("nan")])
    assert layers == ["no layer", "2", "10"]
    assert projections == ["query", "attention.output.dense", "output.dense", "pooler"]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[nan] * 4, [2, 3, 4, nan], [1, nan, nan, nan]])


def test_a_run_has_its_figures_and_heat_maps_only_where_recorded():
    (run,) = read_runs([make_record("r", "proposed_fw_lora", modules=True)])
    topics = ["learning_curve", "confusion_matrix", "module_delta_norm", "module_importance"]
    drawn = run_figures.draw_run(run)
    assert sorted(drawn) == sorted(topics)
    for each in drawn.values():
        assert each.pdf.startswith(b"%PDF")
        assert b"FontFile2" in each.pdf and b"/Type3" not in each.pdf
        assert b"CreationDate" not in each.pdf and b"Matplotlib" not in each.pdf
        svg = ElementTree.fromstring(each.svg)
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert not svg.findall(".//{http://www.w3.org/2000/svg}image"), "a picture of a picture is no vector figure"
        assert b"<dc:date>" not in each.svg and b"Matplotlib" not in each.svg
    (plain,) = read_runs([make_record("l", modules=True)])
    plain.record.summary[metrics.MODULE_IMPORTANCES] = [None] * len(plain.record.summary[metrics.MODULE_NAMES])
    assert set(run_figures.draw_run(plain)) == {"learning_curve", "confusion_matrix", "module_delta_norm"}
    (adalora,) = read_runs([make_record("a", "adalora", modules=True)])
    assert "module_rank" in run_figures.draw_run(adalora), "its ranks are what AdaLoRA found"


def test_learning_curve_marks_final_and_best():
    (run,) = read_runs([make_record("r", "proposed_fw_lora")])
    figure = Figure()
    run_figures._draw_learning_curve(figure, run)
    final = run.values["eval_accuracy"]
    assert texts_of(figure.axes[1]) == [f"final {final:.4f}", f"best {final + 0.01:.4f}"]
    assert texts_of(figure.axes[0]) == ["final 0.3500", "best 0.3000"]
    assert "Fisher warm-up" in figure.axes[0].get_legend_handles_labels()[1]


def test_confusion_matrix_shows_counts_and_row_percent():
    (run,) = read_runs([make_record("r")])
    figure = Figure()
    run_figures._draw_confusion(figure, run)
    expected = []
    for gold in (0, 1):
        for predicted in (0, 1):
            count = int(np.sum((run.labels == gold) & (run.predictions == predicted)))
            expected.append(f"{count}\n{100 * count / np.sum(run.labels == gold):.1f} %")
    assert texts_of(figure.axes[0]) == expected


def test_bars_carry_their_values_and_one_point_per_seed():
    given = [make_record(f"{name}{s}", m, s) for s in (1, 2) for name, m in (("b", "baseline_lora"), ("a", "adalora"))]
    (cell,) = cells_of(*given, make_record("p", "proposed_fw_lora", 1))
    figure = Figure()
    cell_figures._draw_bars(figure, cell=cell, metric="eval_accuracy", label="accuracy", decimals=4)
    (axes,) = figure.axes
    means = [group.mean("eval_accuracy") for group in cell.groups]
    assert [bar.get_height() for bar in axes.patches] == means
    assert texts_of(axes) == [f"{mean:.4f}" for mean in means]
    scattered = [collection for collection in axes.collections if isinstance(collection, PathCollection)]
    points = [collection.get_offsets()[:, 1].tolist() for collection in scattered]
    assert points == [group.values("eval_accuracy") for group in cell.groups]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["LoRA\nn = 2", "AdaLoRA\nn = 2", "FW-LoRA\nn = 1"]


def test_difference_figure_shows_the_computed_intervals():
    given = [make_record(f"{m}{s}", m, s) for s in (1, 2) for m in ("baseline_lora", "proposed_fw_lora")]
    (cell,) = cells_of(*given)
    (pair,) = compare([cell]).pairs
    panel = cell_figures._arrange_differences(cell, pair)
    rows, height = panel.rows, panel.height
    assert [row.kind for row in rows] == ["baseline", "seed", "seed"]
    assert (rows[0].difference, rows[0].low) == (100 * pair.primary.tests.mean, 100 * pair.primary.low)
    assert rows[2].high == 100 * pair.per_seed[1].intervals["accuracy"].high
    assert sorted(row.position for row in rows) == [row.position for row in rows] and height > rows[-1].position


def test_every_pair_has_an_axis_of_its_own():
    """One weak method does not flatten the intervals of the others."""
    given = [make_record(f"{m}{s}", m, s) for s in (1, 2) for m in ("baseline_lora", "proposed_fw_lora")]
    given += [make_record(f"weak{s}", "adalora", s, error_rate=0.6) for s in (1, 2)]
    cells = cells_of(*given)
    comparison = compare(cells)
    pairs = [pair for pair in comparison.pairs if pair.first == "FW-LoRA"]
    figure = Figure()
    panels = [cell_figures._arrange_differences(cells[0], pair) for pair in pairs]
    cell_figures._draw_differences(figure, cells[0], pairs, panels)
    for axes, pair in zip(figure.axes, pairs, strict=True):
        low, high = axes.get_xlim()
        shown = max(
            abs(end)
            for seed in pair.per_seed
            for end in (seed.intervals["accuracy"].low, seed.intervals["accuracy"].high)
        )
        reach = 100 * max(shown, abs(pair.primary.low), abs(pair.primary.high))
        assert low <= 0 <= high and reach / 2 < max(-low, high) < 1.5 * reach
    assert {pair.second for pair in pairs} == {"LoRA", "AdaLoRA"}


def one_epoch(record):
    """Keep the last epoch alone."""
    rows = record.history[-records.STEPS_PER_EPOCH :]
    for place, row in enumerate(rows, start=1):
        row[metrics.GLOBAL_STEP] = place
    return records.change(record, history=rows)


def test_one_epoch_is_shown_on_the_scale_of_its_metric():
    (cell,) = cells_of(one_epoch(make_record("b")), one_epoch(make_record("p", "proposed_fw_lora")))
    figure = Figure()
    cell_figures._draw_curves(figure, cell)
    assert figure.axes[1].get_ylim() == (0, 1) and figure.axes[1].get_xlim()[0] == 0
    figure = Figure()
    run_figures._draw_learning_curve(figure, cell.runs[0])
    assert figure.axes[1].get_ylim() == (0, 1) and figure.axes[1].get_xlim() == (0, 1.1 * records.STEPS_PER_EPOCH)
    figure = Figure()
    run_figures._draw_learning_curve(figure, cells_of(make_record("b"))[0].runs[0])
    assert figure.axes[1].get_ylim()[0] > 0.5, "several epochs keep an axis of their own"


@pytest.mark.parametrize("scores", [(0.5,), (0.5, 0.5), (0.7, 0.6, 0.5), (0.5, 0.7, 0.6), (0.1, 0.5, 0.9)])
def test_labels_of_final_and_best_stay_inside_the_axes(scores):
    given = make_record("r", "proposed_fw_lora")
    rows = [row for row in given.history if "eval_accuracy" not in row][: len(scores) * 4]
    for epoch, score in enumerate(scores, start=1):
        rows[4 * epoch - 1] |= {"eval_accuracy": score, metrics.EVAL_LOSS: 1 - score}
    for place, row in enumerate(rows, start=1):
        row[metrics.GLOBAL_STEP] = place
    (run,) = read_runs([records.change(given, history=rows)])
    drawn = []

    def draw(figure: Figure) -> None:
        run_figures._draw_learning_curve(figure, run)
        drawn.append(figure)

    figure_style.render(draw, *run_figures.LEARNING_CURVE_SIZE, "words")
    for axes in drawn[0].axes:
        inside = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, text


def test_colors_stay_with_their_methods():
    lora, fw = make_record("b"), make_record("p", "proposed_fw_lora")
    (two,) = cells_of(lora, fw)
    (three,) = cells_of(lora, fw, make_record("a", "adalora"))
    styles = figure_style.style_groups(three.groups)
    assert figure_style.style_groups(two.groups) == {label: styles[label] for label in ("LoRA", "FW-LoRA")}
    assert len({style["color"] for style in styles.values()}) == 3
    assert len({style["marker"] for style in styles.values()}) == 3


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch):
    """Figures are drawn but not encoded, which takes most of the time and has tests of its own."""

    def draw_only(draw, width: float, height: float, caption: str) -> figure_style.Drawing:
        figure = Figure(figsize=(width, height))
        draw(figure)
        return figure_style.Drawing(str(len(figure.axes)).encode(), b"", caption)

    for module in (cell_figures, overview_figures, run_figures):
        monkeypatch.setattr(module, "render", draw_only)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_figures_of_one_cell(seeds):
    given = [make_record(f"{m}{s}", m, s, subset="cola") for s in seeds for m in ("baseline_lora", "proposed_fw_lora")]
    (cell,) = cells_of(*given)
    drawn = cell_figures.draw_cell(cell, compare([cell]))
    expected = {
        "accuracy_bar_chart",
        "matthews_correlation_bar_chart",
        "training_time_bar_chart",
        "quality_time",
        "learning_curves",
        "paired_difference",
    }
    boxes = {"accuracy_box_plot", "matthews_correlation_box_plot"}
    assert set(drawn) == expected | (boxes if len(seeds) > 1 else set())
    assert all(len(drawing.caption) > 10 for drawing in drawn.values())


@pytest.mark.usefixtures("undrawn")
def test_file_names_are_unique_over_runs_and_cells():
    methods = ("baseline_lora", "proposed_fw_lora")
    given = [make_record(f"{m}{b}", m, budget=b, modules=True) for b in (0.2, 0.5) for m in methods]
    figures = draw_figures(gather_evidence(given, {}, resamples=100))
    assert set(figures.overview) == {"pooled_difference", "quality_budget"}
    files = figures.files(Path("r"))
    names = [path.name for path in files]
    assert len(names) == len(set(names)) == sum(map(len, (*figures.runs.values(), *figures.cells.values()))) + 2
    assert "comparison_accuracy_bar_chart_glue-sst2-roberta-base-0.2pct.pdf" in names
    assert Path("r/baseline_lora0.5/baseline_lora0.5_learning_curve.pdf") in files
    one = Figures({}, {"only": figures.cells["glue-sst2-roberta-base-0.2pct"]}, {}).files(Path("r"))
    assert Path("r/comparison/comparison_quality_time.pdf") in one


def test_pooled_and_budget_figures_show_the_computed_values():
    methods = ("baseline_lora", "proposed_fw_lora")
    given = [make_record(f"{m}{b}{s}", m, s, budget=b) for b in (0.2, 0.5) for s in (1, 2) for m in methods]
    cells = cells_of(*given)
    (entry,) = compare(cells).pooled
    figure = Figure()
    overview_figures._draw_pooled(figure, [entry])
    (label,) = figure.axes[0].get_yticklabels()
    shown = f"{100 * entry.mean:+.2f} [{100 * entry.low:+.2f}, {100 * entry.high:+.2f}], 2 cells, 4 pairs"
    assert label.get_text() == f"FW-LoRA minus LoRA\n{shown}"
    figure = Figure()
    overview_figures._draw_budgets(figure, [cells])
    lines = [line.get_ydata().tolist() for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    for role in ("lora", "proposed"):
        means = [group.mean("eval_accuracy") for cell in cells for group in cell.groups if group.role == role]
        assert means in lines
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.2 %", "0.5 %"]


def test_a_thinned_curve_keeps_its_extremes_and_its_order():
    steps, values = np.arange(50_000.0), np.random.default_rng(0).normal(size=50_000)
    thin_steps, thin_values = figure_style.thin_curve(steps, values, most=1000)
    assert 900 < thin_steps.size <= 1000 and np.all(np.diff(thin_steps) > 0)
    np.testing.assert_array_equal(values[thin_steps.astype(int)], thin_values)
    for stretch in np.array_split(np.arange(50_000), 500):
        assert {values[stretch].min(), values[stretch].max()} <= set(thin_values)
    assert figure_style.thin_curve(steps[:10], values[:10], most=10)[0].size == 10


PROCESS = """
import hashlib, importlib.util, sys
from fwlora.experiment.evaluation.figures.draw import draw_figures
from fwlora.experiment.evaluation.evidence import gather_evidence
spec = importlib.util.spec_from_file_location("evaluation_records", sys.argv[1])
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)
figures = draw_figures(gather_evidence([records.make_record("p", "proposed_fw_lora")], {}))
for drawings in (*figures.cells.values(), *figures.runs.values()):
    for topic, drawing in drawings.items():
        print(topic, hashlib.sha256(drawing.pdf + drawing.svg).hexdigest())
print("pyplot", "matplotlib.pyplot" in sys.modules)
"""


def test_equal_records_give_equal_figures_in_any_process_and_no_global_ones():
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROCESS, str(RECORDS_FILE)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and len(printed[0]) == 7
    assert printed[0][-1] == "pyplot False"


def test_characters_beyond_the_small_font_come_from_the_whole_one():
    drawing = figure_style.render(lambda figure: figure.suptitle("ΔW ‖ − Ж ∮"), 3.0, 1.0, "words")
    embedded = set(re.findall(rb"/BaseFont /[A-Z]{6}\+(\w+)", drawing.pdf))
    assert embedded == {b"DejaVuSansfwlora", b"DejaVuSans"}
    plain = figure_style.render(lambda figure: figure.suptitle("ΔW ‖ −"), 3.0, 1.0, "words")
    assert set(re.findall(rb"/BaseFont /[A-Z]{6}\+(\w+)", plain.pdf)) == {b"DejaVuSansfwlora"}
    assert len(plain.pdf) < 12_000


def test_several_processes_draw_the_same(monkeypatch: pytest.MonkeyPatch):
    given = [make_record(f"{m}{s}", m, s) for s in (1, 2) for m in ("baseline_lora", "proposed_fw_lora")]
    evidence = gather_evidence(given, {}, resamples=50)
    alone = draw_figures(evidence)
    monkeypatch.setattr(drawing, "MIN_RUNS_TO_SHARE", 1)
    assert draw_figures(evidence, workers=2) == alone


def test_names_are_drawn_as_they_are():
    """Dollar signs are no formulas, and an unbalanced one ends nothing."""
    given = [
        records.change(
            records.make_record(name, method),
            config__resolved__label_names=["$x_1$ {", "100 % & \\frac"],
            config__run__model__name="model $a_b",
        )
        for name, method in (("b$1$", "baseline_lora"), ("p^2_", "proposed_fw_lora"))
    ]
    figures = draw_figures(gather_evidence(given, {}, resamples=50))
    assert all(drawing.pdf.startswith(b"%PDF") for drawing in figures.runs["b$1$"].values())


def test_characters_without_a_glyph_are_found():
    assert find_missing_characters(["Résumé α → 5 ≤ 6", "a b\tc"]) == ""
    assert find_missing_characters(["x\U0010fffd", "\U0010fffdy"]) == "\U0010fffd"


LONG = "a-run-id-of-many-words-that-goes-on-until-no-figure-is-wide-enough-for-it"


@pytest.mark.parametrize(("subset", "seeds", "budgets"), [("cola", (1,), (0.2,)), ("stsb", (1, 2), (0.2, 0.5))])
def test_no_text_leaves_its_figure(monkeypatch: pytest.MonkeyPatch, subset, seeds, budgets):
    drawn: dict[int, tuple[Text, Figure]] = {}
    draw_text = Text.draw

    def draw_and_keep(text: Text, renderer) -> None:
        figure = text.get_figure(root=True)
        if figure is not None and text.get_text().strip():
            drawn[id(text)] = text, figure
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", draw_and_keep)
    methods = ("baseline_lora", "proposed_fw_lora", "a_method_of_my_own_with_a_long_name")
    given = [
        records.change(
            make_record(f"{LONG}-{method}-{budget}-{seed}", method, seed, 0.1, subset, budget, modules=True),
            config__run__model__name="an-organization/and-a-model-of-its-own-with-a-long-name",
        )
        for method in methods
        for seed in seeds
        for budget in budgets
    ]
    draw_figures(gather_evidence(given, {}, resamples=20))
    outside = []
    for text, figure in drawn.values():
        box, frame = text.get_window_extent(), figure.bbox
        if not (box.x0 >= -1 and box.y0 >= -1 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1):
            outside.append(text.get_text())
    assert outside == [] and len({figure for _, figure in drawn.values()}) > 10
