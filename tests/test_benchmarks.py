"""The benchmarks' arithmetic, that they run, and the sketch's quality on real data."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from scipy import stats
from test_families import make_base

from benchmarks import overhead, sketch_quality
from benchmarks.common import MODELS, median_interval, mixture_interval
from fwlora import FisherWeighting


def test_intervals_by_hand():
    ratios = np.array([0.9, 1.0, 1.0, 1.0, 1.4])
    interval = median_interval(ratios)
    assert interval.estimate == 1.0 and 0.9 <= interval.low <= 1.0 <= interval.high <= 1.4
    mixed = mixture_interval([(0.25, 2 * ratios), (0.75, ratios)])
    assert mixed.estimate == pytest.approx(0.25 * 2.0 + 0.75)
    # Parts are resampled together: of one and the same ratio, the mixture is that ratio.
    assert mixture_interval([(0.5, ratios), (0.5, ratios)]).low in ratios


def test_a_whole_run_is_the_schedules_mixture_of_steps():
    generator = np.random.default_rng(0)
    lora = generator.uniform(0.9, 1.1, 50)
    factors = dict.fromkeys(overhead.make_variants(lambda: None, 8, None), 1.0)
    factors |= {"sketch, measured step": 1.08, "unmeasured step": 1.01, "shrinkage step": 1.005}
    found = overhead.summarise({name: factor * lora for name, factor in factors.items()})
    every = FisherWeighting().fisher_every
    warm = 1.08 / every + 1.01 * (1 - 1 / every)
    assert found[f"sketch, warm-up step (1 of {every} measured)"].estimate == pytest.approx(warm)
    expected = (500 * warm + 5815 * 1.005) / 6315
    assert found["sketch, whole run (500 of 6,315 steps)"].estimate == pytest.approx(expected)


def test_overhead_runs_and_writes_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(MODELS, "minilm", lambda: make_base("roberta"))
    arguments = ["overhead", "--rounds", "3", "--batch-size", "2", "--device", "cpu", "--model", "minilm"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(tmp_path / "out" / "overhead.json")])
    monkeypatch.setattr(overhead, "BATCH_LENGTHS", (5, 7))
    overhead.main()
    record = json.loads((tmp_path / "out" / "overhead.json").read_text())
    assert record["settings"]["rounds"] == 3 and record["environment"]["packages"]["peft"]
    assert len(record["ratios"]["shrinkage step"]) == 3
    memory = record["peak_bytes"]
    assert memory["lora"] == memory["lora again"] <= memory["unmeasured step"] < memory["naive, warm-up step"]
    assert "targets: warm-up step <= 1.02" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("minilm")
def test_the_sketch_ranks_matrices_as_exact_does_on_real_data(glue_folder):
    fishers = sketch_quality.watch_training(1, str(glue_folder), steps=200, batch_size=32, learning_rate=2e-3)
    correlation = stats.spearmanr(fishers["exact"], fishers[f"sketch, k = {FisherWeighting().sketch_size}"]).statistic
    assert correlation >= sketch_quality.TARGET_SPEARMAN
