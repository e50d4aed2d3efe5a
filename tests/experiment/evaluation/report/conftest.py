"""One report that its tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fwlora.experiment.evaluation.compare.results import ComparisonWarning
from fwlora.experiment.evaluation.evidence import Evidence, gather_evidence
from fwlora.experiment.evaluation.figures import style as figure_style
from fwlora.experiment.evaluation.figures.style import Drawing
from fwlora.experiment.evaluation.report.render import render_report
from tests.helpers.evaluation_records import change
from tests.helpers.pages import CLAIMS, HOSTILE, METHODS, ORIGIN, make_figures, make_run


@pytest.fixture(scope="session")
def drawing() -> Drawing:
    def draw(figure: Any) -> None:
        curve, heat_map = figure.subplots(1, 2)
        curve.plot([0.0, 1.0, 2.0], [0.1, 0.7, 0.3], marker="o")
        curve.set_title("a < b")
        figure.colorbar(heat_map.pcolormesh([[1.0, 2.0], [3.0, 4.5]]), ax=heat_map)

    return figure_style.render(draw, 4.0, 3.0, "A curve")


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    """Two data sets, three methods, two seeds; texts that would break a page that does not escape them."""
    runs = [
        make_run(f"{method}-{subset}-110M--seed {seed}", method, seed, subset, dirty=(method, seed) == ("adalora", 2))
        for subset in ("sst2", "cola")
        for seed in (1, 2)
        for method in METHODS
    ]
    runs[0] = change(runs[0], config__resolved__command=HOSTILE, summary__params_adapter_final=200_000)
    hostile = CLAIMS["above-lora"].model_copy(update={"statement": HOSTILE, "quote": HOSTILE})
    found = gather_evidence(runs, {**CLAIMS, "above-lora": hostile}, resamples=200)
    return replace(found, warnings=[*found.warnings, ComparisonWarning(None, HOSTILE)])


@pytest.fixture(scope="session")
def html(evidence: Evidence, drawing: Drawing) -> bytes:
    return render_report(evidence, make_figures(evidence, drawing), ORIGIN)
