"""Time and memory of reading and evaluating many long runs.

    uv run python -m benchmarks.evaluation --json benchmarks/results/evaluation_cpu.json

Four variants x five seeds are recorded offline by the W&B client itself, made up but complete, and read from their
files by fresh processes: W&B's own inspector (one run), ``open_source`` and ``src.evaluate`` (all runs).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import print_table, write_json
from fwlora.experiment.paths import CONFIG_DIR, REPOSITORY
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.tracking import metrics, task_metrics
from fwlora.experiment.tracking.metrics import best_name, eval_name, final_name
from fwlora.experiment.tracking.records import pack_classes
from fwlora.experiment.tracking.task_metrics import compute_task_metrics
from fwlora.experiment.tracking.wandb import WandbSettings
from fwlora.experiment.tracking.wandb.session import end_session

VARIANTS = {
    "lora": ("comparative-1-roberta-base-110M--SST-2-GLUE", 0.060, {}),
    "adalora": ("comparative-2-roberta-base-110M--SST-2-GLUE", 0.065, {}),
    "proposed": ("proposed-roberta-base-110M--SST-2-GLUE", 0.055, {}),
    "proposed, adapter": ("proposed-roberta-base-110M--SST-2-GLUE", 0.058, {"estimator": "adapter"}),
}
MATRICES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "intermediate.dense",
    "output.dense",
)
LABEL_NAMES = ["negative", "positive"]
EVAL_EXAMPLES = 872
EPOCHS = 3
TARGET_SECONDS, TARGET_MIB = 60.0, 1024.0
PLACE = {"entity": "benchmark", "project": "benchmark"}
READ = (
    "import json, sys; from pathlib import Path; from fwlora.experiment.tracking import known_trackers, open_source;"
    "results_dir, run_ids = Path(sys.argv[1]), json.loads(sys.argv[2]);"
    "settings = known_trackers()['wandb'](entity='-', project='-');"
    "records = open_source(settings, results_dir=results_dir, source='files').load(run_ids);"
    "assert all(record.finished for record in records);"
    "print(sum(len(record.history) for record in records))"
)


def make_config(variant: str, seed: int) -> dict[str, Any]:
    """Settings as ``src.train`` records them, and what it would have found out."""
    run_file, _, changes = VARIANTS[variant]
    arguments = [f"run={run_file}-s{seed}", "mode=full", "results_dir=.", "run.optuna.n_trials=0"]
    config = compose_settings([*arguments, *(f"run.fw_lora.{k}={v}" for k, v in changes.items())], CONFIG_DIR, {})
    resolved = {
        "task": "sst2",
        "label_names": LABEL_NAMES,
        "primary_metric": eval_name("accuracy"),
        "precision": "bf16",
        "train_examples": 67_349,
        "eval_examples": EVAL_EXAMPLES,
        "eval_fingerprint": "made-up",
    }
    entries = {**config.model_dump(), "resolved": resolved}
    entries["run"]["run_id"] = f"{variant.replace(', ', '-')}-s{seed}"
    return entries


def make_rows(generator: np.random.Generator, method: str, steps: int) -> Iterator[dict[str, float | int]]:
    """A row per step, as the engine logs them, and one more at the end of each epoch."""
    per_epoch = max(1, steps // EPOCHS)
    noise = generator.random((steps, 3))
    for step in range(1, steps + 1):
        row: dict[str, float | int] = {
            metrics.GLOBAL_STEP: step,
            metrics.EPOCH: step / per_epoch,
            metrics.TRAIN_LOSS: 0.7 * float(np.exp(-3 * step / steps)) + 0.05 * float(noise[step - 1, 0]),
            metrics.LEARNING_RATE: 2e-4 * (1 - step / (steps + 1)),
            metrics.GRADIENT_NORM: 1.0 + float(noise[step - 1, 1]),
            metrics.PENALTY: 1e-3 * float(noise[step - 1, 2]),
            metrics.FISHER_WARMUP: float(method.startswith("proposed") and step <= 500),
        }
        if method == "adalora":
            row[metrics.ACTIVE_RANK] = 72 + max(0, 36 - step // 100)
        yield row
        if step % per_epoch == 0:
            accuracy = 0.90 + 0.01 * step / steps
            yield {
                metrics.GLOBAL_STEP: step,
                metrics.EPOCH: step / per_epoch,
                metrics.TRAIN_EPOCH_LOSS: 0.3,
                metrics.TRAIN_EPOCH_ACCURACY: accuracy,
                metrics.EVAL_LOSS: 0.25,
                **{eval_name(name): accuracy for name in task_metrics.TASK_METRICS},
            }


def make_summary(generator: np.random.Generator, variant: str, steps: int) -> dict[str, Any]:
    """Final values that follow from predictions wrong at the variant's rate."""
    labels = np.random.default_rng(0).integers(0, 2, EVAL_EXAMPLES)
    predictions = np.where(generator.random(EVAL_EXAMPLES) < VARIANTS[variant][1], 1 - labels, labels)
    values = {eval_name(name): value for name, value in compute_task_metrics(labels, predictions, 2).items()}
    values[metrics.EVAL_LOSS] = 0.25
    modules = [f"roberta.encoder.layer.{layer}.{place}" for layer in range(12) for place in MATRICES]
    weights = generator.dirichlet(np.full(len(modules), 0.3))
    return {
        metrics.COMPLETED: True,
        metrics.PRIMARY_METRIC: eval_name("accuracy"),
        **{final_name(name): value for name, value in values.items()},
        **{best_name(name): value for name, value in values.items()},
        metrics.TRAINING_TIME_S: 1000.0 + float(generator.random()),
        metrics.TIME_WARMUP_S: 80.0,
        metrics.TIME_TRAIN_S: 920.0,
        metrics.PEAK_MEMORY_MIB: 2048.0,
        metrics.TOTAL_STEPS: steps,
        metrics.PARAMS_ADAPTER: 248_000,
        metrics.PARAMS_ADAPTER_FINAL: 248_000,
        metrics.MODULE_NAMES: modules,
        metrics.MODULE_RANKS: [3] * len(modules),
        metrics.MODULE_DELTA_NORMS: [float(value) for value in generator.gamma(2.0, 0.1, len(modules))],
        metrics.MODULE_IMPORTANCES: [float(w) if variant.startswith("proposed") else None for w in weights],
        metrics.EVAL_PREDICTIONS: pack_classes(predictions, 2),
        metrics.EVAL_LABELS: pack_classes(labels, 2),
        metrics.EVAL_FINGERPRINT: "made-up",
    }


def record_runs(results_dir: Path, count: int, steps: int) -> list[str]:
    """Records the first ``count`` of all runs, seeds within variants; returns their ids."""
    run_ids = []
    for variant, seed in itertools.islice(itertools.product(VARIANTS, range(1, 1 + -(-count // len(VARIANTS)))), count):
        generator = np.random.default_rng([seed, list(VARIANTS).index(variant)])
        config = make_config(variant, seed)
        run_id = config["run"]["run_id"]
        settings = WandbSettings(entity=PLACE["entity"], project=PLACE["project"], mode="offline")
        tracker = settings.open_tracker(run_id=run_id, config=config, directory=results_dir / run_id)
        for row in make_rows(generator, config["run"]["method"], steps):
            tracker.log(row)
        tracker.set_summary(make_summary(generator, variant, steps))
        tracker.finish()
        run_ids.append(run_id)
    end_session()
    return run_ids


def measure(command: list[str], repeats: int) -> dict[str, Any]:
    """Seconds and largest resident memory of a command and all of its children, median of its repetitions."""
    seconds, peaks = [], []
    for _ in range(repeats):
        started, peak = time.perf_counter(), 0
        with tempfile.TemporaryFile() as output:
            process = psutil.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                resident = 0
                with suppress(psutil.Error):
                    for member in (process, *process.children(recursive=True)):
                        with suppress(psutil.Error):
                            resident += member.memory_info().rss
                peak = max(peak, resident)
                time.sleep(0.02)
            seconds.append(time.perf_counter() - started)
            if process.returncode:
                output.seek(0)
                raise RuntimeError(f"{' '.join(command[:4])} failed:\n{output.read().decode()[-3000:]}")
        peaks.append(peak / 2**20)
    return {
        "seconds": statistics.median(seconds),
        "peak_mib": statistics.median(peaks),
        "all_seconds": seconds,
        "all_peak_mib": peaks,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="a multiple of four")
    parser.add_argument("--rows", type=int, default=10_000, help="steps of a run, each a row of its history")
    parser.add_argument("--stage", choices=["read", "all"], default="all", help="read: without src.evaluate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the results are written")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results_dir = Path(folder)
        started = time.perf_counter()
        run_ids = record_runs(results_dir, options.runs, options.rows)
        print(
            f"recorded {len(run_ids)} runs of {options.rows:,} steps in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        names = json.dumps(run_ids)
        (log, *_) = results_dir.glob(f"{run_ids[0]}/wandb/offline-run-*/*.wandb")
        commands = {
            "wandb leet inspect, 1 run": [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
            "open_source, 1 run": [sys.executable, "-c", READ, folder, json.dumps(run_ids[:1])],
            f"open_source, {len(run_ids)} runs": [sys.executable, "-c", READ, folder, names],
        }
        if options.stage == "all":
            evaluate = [
                sys.executable,
                "-m",
                "src.evaluate",
                f"results_dir={folder}",
                f"run_ids={names}",
                "source=files",
            ]
            commands[f"src.evaluate, {len(run_ids)} runs"] = evaluate
        for name, command in commands.items():
            results[name] = measure(command, options.repeats)
    columns = ["process", "seconds", "peak MiB"]
    rows = [[name, f"{value['seconds']:.1f}", f"{value['peak_mib']:.0f}"] for name, value in results.items()]
    print_table(f"{options.runs} runs of {options.rows:,} steps, median of {options.repeats}", columns, rows)
    if options.stage == "all":
        last = results[f"src.evaluate, {len(run_ids)} runs"]
        met = last["seconds"] < TARGET_SECONDS and last["peak_mib"] < TARGET_MIB
        print(f"target {TARGET_SECONDS:.0f} s and {TARGET_MIB:.0f} MiB: {'met' if met else 'missed'}")
    if options.json:
        settings = {"runs": options.runs, "rows": options.rows, "repeats": options.repeats}
        write_json(options.json, torch.device("cpu"), settings, {"processes": results})


if __name__ == "__main__":
    main()
