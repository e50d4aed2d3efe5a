"""The intervals' promise, where the truth is known."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import interval_coverage
from benchmarks.interval_coverage import REGIMES, measure

COVERED = [name for name in REGIMES if not REGIMES[name].collapse]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("regime", COVERED)
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent(regime, seeds):
    found = measure(REGIMES[regime], seeds, 2_000, seed=0)
    error = 2 * found["coverage_error"]
    assert 0.93 - error <= found["coverage"] <= 0.97 + error
    assert found["supported"] + found["refuted"] <= 0.06


@pytest.mark.parametrize("regime", ["seeds", "both", "examples, interaction"])
def test_a_few_repetitions_are_near_it(regime):
    """A bootstrap of three seeds covers 0.80; 200 repetitions tell that from 0.95."""
    found = measure(REGIMES[regime], 3, 200, seed=0)
    assert 0.90 <= found["coverage"] <= 1.0 and found["supported"] + found["refuted"] <= 0.09


def test_where_a_method_can_collapse_every_decision_says_what_it_rests_on():
    found = measure(REGIMES["collapse in 1 of 8"], 5, 100, seed=0)
    assert found["supported"] > 0.05 and found["decided_with_a_caveat"] == 1.0


def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--repetitions", "4", "--json", str(tmp_path / "coverage.json")])
    interval_coverage.main()
    written = json.loads((tmp_path / "coverage.json").read_text())
    assert set(written["seeds"]) == {"2", "3", "5", "10"} and written["settings"]["repetitions"] == 4
    assert "collapse in 1 of 8" in capsys.readouterr().out
