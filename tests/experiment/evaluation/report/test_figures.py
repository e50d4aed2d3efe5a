from __future__ import annotations

import base64

from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.figures.style import Drawing
from fwlora.experiment.evaluation.report.figures import EmbeddedFigure, describe_figures, describe_run_figures
from tests.helpers.evaluation_records import make_record

SIZED = Drawing(b"%PDF", b'<svg width="300pt" height="150.4pt">', "A caption")
BARE = Drawing(b"%PDF", b"<svg>", "Another")


def test_figures_are_listed_over_all_cells_and_then_cell_by_cell():
    cells = gather_evidence([make_record("a", subset="sst2"), make_record("b", subset="cola")], {}, resamples=5).cells
    drawn = Figures({"pooled": SIZED}, {cells[1].slug: {"bars": BARE}, "unknown": {"bars": SIZED}}, {})
    groups = describe_figures(drawn, cells)
    assert [title for title, _ in groups] == ["Over all cells", cells[1].name]
    (overall,), (one,) = (figures for _, figures in groups)
    assert overall == EmbeddedFigure(
        caption="A caption",
        svg=base64.b64encode(SIZED.svg).decode(),
        width=400,
        height=201,
        file="comparison_pooled.pdf",
        address="../comparison_pooled.pdf",
    )
    assert (one.width, one.height, one.file) == (None, None, f"comparison_bars_{cells[1].slug}.pdf")


def test_a_runs_confusion_matrix_is_only_named_and_addresses_are_quoted():
    figures = Figures({}, {}, {"a run": {"learning_curve": SIZED, "confusion_matrix": SIZED, "predictions": SIZED}})
    curve, confusion, predictions = describe_run_figures(figures, "a run")
    assert (curve.file, curve.address) == ("a run_learning_curve.pdf", "../../a%20run/a%20run_learning_curve.pdf")
    assert curve.svg and predictions.svg and confusion.svg is None
    assert describe_run_figures(figures, "another") == []
