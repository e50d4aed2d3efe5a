"""The benchmarks' arithmetic, that they run, and the sketch's quality on real data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import (
    overhead,
    sketch_quality,
    stepping,
    training,
    training_methods,
    training_profile,
    training_quality,
)
from benchmarks.common import MODELS, median_interval, mixture_interval
from fwlora import FisherWeighting
from tests.helpers.family_models import make_base
from tests.helpers.paths import REPOSITORY


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
    found = overhead.summarize({name: factor * lora for name, factor in factors.items()})
    every = FisherWeighting().fisher_every
    warm = 1.08 / every + 1.01 * (1 - 1 / every)
    assert found[f"sketch, warm-up step (1 of {every} measured)"].estimate == pytest.approx(warm)
    expected = (500 * warm + 5815 * 1.005) / 6315
    assert found["sketch, whole run (500 of 6,315 steps)"].estimate == pytest.approx(expected)


def test_evaluation_is_measured_on_runs_that_can_be_evaluated(tmp_path):
    arguments = ["--runs", "4", "--rows", "30", "--repeats", "1", "--json", str(tmp_path / "e.json")]
    command = [sys.executable, "-m", "benchmarks.evaluation", *arguments]
    # A process of its own, as W&B's session is one for a process.
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "src.evaluate, 4 runs" in done.stdout, done.stderr
    processes = json.loads((tmp_path / "e.json").read_text())["processes"]
    assert all(each["seconds"] > 0 and each["peak_mib"] > 20 for each in processes.values()) and len(processes) == 4


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


def test_ratios_of_sums_and_their_intervals():
    engine, trainer = np.full(50, 0.1), np.tile([0.3, 0.5], 25)
    interval = training.ratio_interval(trainer, engine)
    assert interval.estimate == pytest.approx(4.0) and 3.5 < interval.low < 4.0 < interval.high < 4.5
    # Rounds are resampled whole: what is always twice as long stays so.
    paired = training.ratio_interval(2 * trainer, trainer)
    assert paired.low == pytest.approx(2.0) and paired.high == pytest.approx(2.0)


def test_speed_is_summarized_with_the_ratios_that_have_targets():
    engine = np.random.default_rng(0).uniform(0.05, 0.07, 60)
    seconds = {name: engine.copy() for name in training.choose_loops("cpu", "bf16")}
    seconds |= {
        "engine, fp32": 1.7 * engine, "limit: products alone, fp32": 1.3 * engine,
        "limit: products alone, bf16": 0.7 * engine, "Trainer, fp32": 6 * engine, "Trainer, bf16": 7 * engine,
        "Trainer grouped by length, fp32": 3 * engine, "Trainer grouped by length, bf16": 2.5 * engine,
    }  # fmt: skip
    found = training.summarize_speed(seconds, "bf16", 32)
    # The Trainer may take the precision that it is faster in.
    assert [target["estimate"] for target in found["targets"].values()] == pytest.approx([0.7, 6.0, 2.5])
    assert found["loops"]["engine, bf16"]["examples_per_second"] == pytest.approx(32 / engine.mean())
    shares = {name: found["loops"][name]["share_of_limit"]["estimate"] for name in ("engine, fp32", "Trainer, bf16")}
    assert shares == pytest.approx({"engine, fp32": 1.3 / 1.7, "Trainer, bf16": 0.1})


def test_a_methods_whole_run_mixes_its_kinds_of_step_within_blocks():
    lora = np.random.default_rng(0).uniform(0.05, 0.07, (4, 60))
    methods = training_methods
    factors = dict.fromkeys(methods.METHODS, 1.0) | {methods.MEASURED: 1.08, methods.SHRINKING: 1.004}
    seconds = {name: factor * lora for name, factor in (factors | {methods.ADALORA: 1.1}).items()}
    seconds[methods.SHRINKING][0, 7] *= 50  # a disturbed round
    offsets = np.array([0.99, 1.01, 1.03, 1.01])
    seconds[methods.ADALORA] *= offsets[:, None]  # processes of unlike speed
    found = methods.summarize_methods(seconds)
    every = FisherWeighting().fisher_every
    warm = 1.08 / every + (1 - 1 / every)
    whole, adalora = found["targets"].values()
    assert whole["estimate"] == pytest.approx((500 * warm + 5815 * 1.004) / 6315)
    assert whole["high"] - whole["low"] < 1e-6
    half = stats.t.ppf(0.975, 3) * (1.1 * offsets).std(ddof=1) / 4**0.5
    assert adalora["estimate"] == pytest.approx(1.1 * 1.01)
    assert adalora["high"] - adalora["estimate"] == pytest.approx(half)


def test_quality_is_the_paired_difference_of_seeds_that_both_have(tmp_path):
    runs = [
        {"task": "sst2", "seed": seed, "loop": loop, "metric": metric}
        for loop, metrics in (("trainer", [80.0, 82.0, 84.0]), ("engine bf16", [80.5, 81.5, 84.5, 99.0]))
        for seed, metric in enumerate(metrics)
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    rows = training_quality.summarize(training_quality.read_runs(path))
    (row,) = (row for row in rows if row["difference"])
    differences = np.array([0.5, -0.5, 0.5])
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    assert (row["first"], row["second"], row["seeds"]) == ("trainer", "engine bf16", 3)
    assert row["difference"]["estimate"] == pytest.approx(differences.mean())
    assert row["difference"]["high"] - row["difference"]["estimate"] == pytest.approx(half)


def count_steps(gate, options) -> None:
    for _ in range(options["steps"]):
        time.sleep(0.01)
        gate.step_done()


def test_a_stepped_loop_takes_a_step_when_told_and_says_what_went_wrong():
    loop = stepping.SteppedLoop(count_steps, {"device": "cpu", "steps": 8}, settle=3)
    loop.settle()
    assert all(0.01 <= loop.step() < 1.0 for _ in range(5))
    with pytest.raises(RuntimeError, match="ended by itself"):
        loop.step()
    failing = stepping.SteppedLoop(count_steps, {"device": "cpu"}, settle=1)
    with pytest.raises(RuntimeError, match="KeyError: 'steps'"):
        failing.settle()


def test_kinds_of_work_are_told_apart():
    matrix, thin, heads = torch.zeros(4, 4), torch.zeros(3, 4, 2), torch.zeros(24, 4, 2)
    assert training_profile.classify("addmm_", (matrix, matrix, matrix)) == "base layers' products"
    assert training_profile.classify("bmm", (thin, thin)) == "adapters' products"
    assert training_profile.classify("baddbmm", (torch.zeros(1, 1, 1), heads, heads)) == "attention"
    assert training_profile.classify("add_", (torch.zeros(9), 1)) == "drawing what is dropped"
    assert training_profile.classify("clone", (matrix,)) == "copies, sums and the rest"


@pytest.mark.slow
@pytest.mark.usefixtures("minilm")
def test_the_sketch_ranks_matrices_as_exact_does_on_real_data(glue_folder):
    fishers = sketch_quality.watch_training(1, str(glue_folder), steps=200, batch_size=32, learning_rate=2e-3)
    correlation = stats.spearmanr(fishers["exact"], fishers[f"sketch, k = {FisherWeighting().sketch_size}"]).statistic
    assert correlation >= sketch_quality.TARGET_SPEARMAN


# What a machine with a GPU may lack.
LACKING = ("hydra", "omegaconf", "wandb", "optuna", "datasets", "pandas", "sklearn", "rich", "matplotlib", "antlr4")


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_without_the_programs_packages(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nclass Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        return None if name.split('.')[0] in {LACKING} else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
    )
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY}",
        "PYTEST_ADDOPTS": "-p no:hydra_pytest",  # a plugin that goes with Hydra
    }
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert set(found) == {"training", "tests", "side_by_side", "overhead"}
    training_part = found["training"]["training"]
    assert set(training_part["loops"]) == {"engine, LoRA", "engine, LoRA, CUDA graphs"} and not training_part["failed"]
    assert all(row["milliseconds_median"] > 0 for row in training_part["loops"].values())
    assert all(set(rates) == {"1", "2"} for rates in found["side_by_side"]["side_by_side"]["steps_per_second"].values())
    if not torch.cuda.is_available():
        assert "skipped" in found["tests"]["tests"]["outcome"]


def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\ncase "$*" in *training*) exit 1;; *) exit 0;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(tmp_path / "python")}, capture_output=True, text=True
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 1 and len(calls) == 4 and "training failed" in done.stdout
    limits = re.findall(r"at most (\d+) s", done.stdout)
    assert len(limits) == 4 and max(map(int, limits)) <= 240 and sum(map(int, limits)) <= 720
