"""What figures show, read back from their artists; that files are vector, embeddable and reproducible."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from fwlora.experiment import comparison, comparison_figures, figures, metrics
from fwlora.experiment.evaluated_runs import read_runs
from fwlora.experiment.evaluation import evaluate_records

RECORDS_FILE = Path(__file__).with_name("evaluation_records.py")
_spec = importlib.util.spec_from_file_location("evaluation_records", RECORDS_FILE)
assert _spec and _spec.loader
records = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(records)
make_record = records.make_record


def cells_of(*given):
    return comparison.group_cells(read_runs(given))


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_running_mean_of_a_hand_computed_case():
    np.testing.assert_allclose(figures.running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2), [2, 3, 5, 7])
    np.testing.assert_allclose(figures.running_mean(np.array([2.0, 4.0, 6.0]), 1), [2, 4, 6])


def test_modules_are_arranged_by_layer_and_shortest_distinct_name():
    names = [
        "bert.encoder.layer.10.attention.self.query",
        "bert.encoder.layer.2.attention.self.query",
        "bert.encoder.layer.2.attention.output.dense",
        "bert.encoder.layer.2.output.dense",
        "pooler",
    ]
    grid, layers, projections = figures.arrange_modules(names, [1.0, 2.0, 3.0, 4.0, float("nan")])
    assert layers == ["no layer", "2", "10"]
    assert projections == ["query", "attention.output.dense", "output.dense", "pooler"]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[nan] * 4, [2, 3, 4, nan], [1, nan, nan, nan]])


def test_a_run_has_its_figures_and_heat_maps_only_where_recorded():
    (run,) = read_runs([make_record("r", "proposed_fw_lora", modules=True)])
    topics = ["learning_curve", "confusion_matrix", "module_delta_norm", "module_importance"]
    drawn = figures.draw_run(run)
    assert sorted(drawn) == sorted(f"r_{topic}.pdf" for topic in topics)
    for content in drawn.values():
        assert content.startswith(b"%PDF")
        assert b"FontFile2" in content and b"/Type3" not in content
        assert b"CreationDate" not in content and b"Matplotlib" not in content
    (plain,) = read_runs([make_record("l", modules=True)])
    assert "l_module_importance.pdf" not in figures.draw_run(plain)
    plain.record.summary[metrics.MODULE_IMPORTANCES] = [None] * len(plain.record.summary[metrics.MODULE_NAMES])
    assert "l_module_importance.pdf" not in figures.draw_run(plain), "LoRA measures no importance"


def test_learning_curve_marks_final_and_best():
    (run,) = read_runs([make_record("r", "proposed_fw_lora")])
    figure = Figure()
    figures._draw_learning_curve(figure, run)
    final = run.values["eval_accuracy"]
    assert texts_of(figure.axes[1]) == [f"final {final:.4f}", f"best {final + 0.01:.4f}"]
    assert texts_of(figure.axes[0]) == ["final 0.3500", "best 0.3000"]
    assert "Fisher warm-up" in figure.axes[0].get_legend_handles_labels()[1]


def test_confusion_matrix_shows_counts_and_row_percent():
    (run,) = read_runs([make_record("r")])
    figure = Figure()
    figures._draw_confusion(figure, run)
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
    comparison_figures._draw_bars(figure, cell=cell, metric="eval_accuracy", label="accuracy", decimals=4)
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
    (pair,) = comparison.compare_pairs([cell], 0, 200)["pairs"]
    rows, height = comparison_figures._arrange_differences(cell, [pair])
    overall = pair["over_seeds"]["accuracy"]
    assert [row.kind for row in rows] == ["baseline", "seed", "seed"]
    assert (rows[0].difference, rows[0].low) == (100 * overall["mean"], 100 * overall["low"])
    assert rows[2].high == 100 * pair["per_seed"][1]["bootstrap"]["accuracy"]["high"]
    assert sorted(row.position for row in rows) == [row.position for row in rows] and height > rows[-1].position


def test_colours_stay_with_their_methods():
    lora, fw = make_record("b"), make_record("p", "proposed_fw_lora")
    (two,) = cells_of(lora, fw)
    (three,) = cells_of(lora, fw, make_record("a", "adalora"))
    look = comparison_figures._look
    assert [look(two, group) for group in two.groups] == [look(three, three.groups[i]) for i in (0, 2)]
    assert len({look(three, group)["color"] for group in three.groups}) == 3


@pytest.fixture
def without_pdf(monkeypatch: pytest.MonkeyPatch):
    """Figures are drawn but not encoded, which takes most of the time and has tests of its own."""

    def draw_only(draw, width: float, height: float) -> bytes:
        figure = Figure(figsize=(width, height))
        draw(figure)
        return str(len(figure.axes)).encode()

    monkeypatch.setattr(comparison_figures, "render_pdf", draw_only)


@pytest.mark.usefixtures("without_pdf")
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_file_names_of_one_cell(seeds):
    given = [make_record(f"{m}{s}", m, s, subset="cola") for s in seeds for m in ("baseline_lora", "proposed_fw_lora")]
    cells = cells_of(*given)
    drawn = comparison_figures.draw_comparison(cells, comparison.compare_pairs(cells, 0, 100))
    expected = {
        "comparison_accuracy_bar_chart.pdf",
        "comparison_matthews_correlation_bar_chart.pdf",
        "comparison_training_time_bar_chart.pdf",
        "comparison_learning_curves.pdf",
        "comparison_paired_difference.pdf",
    }
    boxes = {"comparison_accuracy_box_plot.pdf", "comparison_matthews_correlation_box_plot.pdf"}
    assert set(drawn) == expected | (boxes if len(seeds) > 1 else set())


@pytest.mark.usefixtures("without_pdf")
def test_several_cells_put_their_condition_into_every_name():
    cells = cells_of(make_record("a"), make_record("c", subset="cola"))
    drawn = comparison_figures.draw_comparison(cells, comparison.compare_pairs(cells, 0, 100))
    assert "comparison_accuracy_bar_chart_glue-sst2-roberta-base-0.2pct.pdf" in drawn
    assert all(
        name.endswith(("_glue-sst2-roberta-base-0.2pct.pdf", "_glue-cola-roberta-base-0.2pct.pdf")) for name in drawn
    )


PROCESS = """
import hashlib, importlib.util, sys
from pathlib import Path
from fwlora.experiment.evaluation import evaluate_records
spec = importlib.util.spec_from_file_location("evaluation_records", sys.argv[1])
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)
given = [records.make_record("p", "proposed_fw_lora")]
for path, content in evaluate_records(given, Path("r")).files.items():
    print(path, hashlib.sha256(content).hexdigest())
print("pyplot", "matplotlib.pyplot" in sys.modules)
"""


def test_equal_records_give_equal_bytes_in_any_process_and_no_global_figures():
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(RECORDS_FILE)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, pyplot = done.stdout.splitlines()
    given = [make_record("p", "proposed_fw_lora")]
    files = evaluate_records(given, Path("r")).files
    assert lines == [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in files.items()]
    assert pyplot == "pyplot False"
