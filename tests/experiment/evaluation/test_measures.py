"""The registry of measures: units by hand, and a measure that one entry adds to everything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.measures import (
    Measure,
    Points,
    Ratio,
    find_measure,
    known_measures,
    register_measure,
    unregister_measure,
)
from fwlora.experiment.evaluation.compare.contrasts import sample_cost
from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.figures.draw import Figures
from fwlora.experiment.evaluation.output import documents, tables
from fwlora.experiment.evaluation.report.render import render_report
from fwlora.experiment.tracking import metrics
from tests.helpers.pages import ORIGIN, parse
from tests.helpers.verdict_runs import make_claim, make_run

MEMORY = Measure(
    "peak_memory",
    Ratio(),
    "ratio of peak memory",
    lambda cell, contrast, resampled, modules: sample_cost(cell, contrast, metrics.PEAK_MEMORY_MIB),
)


@pytest.fixture
def memory() -> Iterator[None]:
    register_measure(MEMORY)
    yield
    unregister_measure("peak_memory")


def test_points_are_hundredths():
    unit = Points()
    assert (unit.to_scale(50.0), unit.from_scale(0.5), unit.to_axis(2), unit.neutral) == (0.5, 50.0, 2.0, 0.0)
    assert unit.format(1.005) + unit.suffix == "+1.00 points"
    assert unit.format_contrast({"A": 1, "B": -0.8, "C": -1}) == "A − 0.8 × B − C"
    unit.check_bound(-3.0)


def test_ratios_are_differences_of_logarithms():
    unit = Ratio()
    assert (unit.to_scale(math.e), unit.from_scale(0.0), unit.to_axis(1.0), unit.neutral) == (1.0, 1.0, 0.0, 1.0)
    assert unit.format(1.0) + unit.suffix == "1.0000"
    assert unit.format_contrast({"A": 1, "B": -1}) == "A / B"
    assert unit.format_contrast({"A": 1, "B": -0.5, "C": -0.5}) == "exp(A − 0.5 × B − 0.5 × C)"
    with pytest.raises(ValueError, match="must be positive"):
        unit.check_bound(0.0)


def test_one_entry_adds_a_measure_to_verdict_table_document_and_report(memory: None):
    given = [
        make_run(role, seed, 3400, summary__peak_memory_mib=1000.0 * (factor + 0.01 * seed))
        for role, factor in (("lora", 1.0), ("proposed", 1.1))
        for seed in range(3)
    ]
    claim = make_claim(
        measure="peak_memory", at_least=None, at_most=1.5, statement="FW-LoRA takes at most half as much memory again"
    )
    evidence = gather_evidence(given, {"memory": claim}, resamples=50)
    (result,) = evidence.claim_results
    ratio = math.exp(sum(math.log((1.1 + 0.01 * seed) / (1.0 + 0.01 * seed)) for seed in range(3)) / 3)
    assert result.verdict == "supported" and result.findings[0].value == pytest.approx(ratio)
    row = tables.render_markdown([result], evidence.cells, evidence.comparison, []).splitlines()[6]
    assert row.startswith(f"| {claim.statement} | supported | {ratio:.4f} [")
    document = json.loads(documents.to_json(documents.describe_claim_results([result])))["memory"]
    assert (document["unit"], document["claim"]["measure"]) == ("ratio", "peak_memory")
    page = parse(render_report(evidence, Figures({}, {}, {}), ORIGIN))
    assert "FW-LoRA / LoRA, ratio of peak memory: at most 1.5" in " ".join(page.text.split())


def test_claims_name_registered_measures_only(memory: None):
    unregister_measure("peak_memory")
    with pytest.raises(ValidationError, match="unknown measure; known: quality, training_time, update_norm"):
        make_claim(measure="peak_memory")
    with pytest.raises(ValueError, match="unknown measure"):
        find_measure("peak_memory")
    with pytest.raises(ValueError, match="a bound of a ratio must be positive"):
        make_claim(measure="training_time", at_least=-1.0)


def test_a_name_is_given_once(memory: None):
    register_measure(MEMORY)
    with pytest.raises(ValueError, match="'quality' is taken"):
        register_measure(Measure("quality", Points(), "another", MEMORY.sample))
    assert list(known_measures()) == ["quality", "training_time", "update_norm", "peak_memory"]
    assert set(Claim.model_fields) >= {"measure", "contrast", "at_least", "at_most"}
