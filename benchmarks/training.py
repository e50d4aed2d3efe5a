"""How fast the engine trains, against the Trainer, the model alone and the machine's limit, all interleaved in one run.

    uv run python -m benchmarks.training --glue FOLDER [--json PATH] [--rounds 200] [--parts speed lengths ...]
                                         [--quality-runs PATH] [--model minilm|roberta-base] [--device cpu|cuda]

Every loop runs in a process of its own and takes a step when it is told to. A round is one step of each, in random
order; every loop goes once over the same examples of SST-2, as many as fill the rounds and twelve steps to settle, in
batches of its own. Ratios are of sums over rounds, with an interval from resampling whole rounds. ``--quality-runs``
joins what ``training_quality`` wrote to the table. Leave the machine idle.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.common import MINILM, RESAMPLES, Interval, print_table, write_json
from benchmarks.overhead import SCHEDULE
from benchmarks.stepping import SteppedLoop
from benchmarks.training_loops import backbone_loop, engine_loop, limit_loop, trainer_loop
from benchmarks.training_profile import compare_precisions, profile_step
from benchmarks.training_quality import read_runs, summarize
from fwlora import FisherWeighting
from fwlora.experiment.paths import REPOSITORY

BATCH_SIZE, RANK = 32, 8
SETTLING_STEPS = 12
MEAN_LENGTHS = (8, 16, 32, 64, 128)
MEMORY_EXAMPLES = (1_000, 8_000, 67_349)
LORA = "engine, LoRA"
LOOPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "padded to 128 tokens, LoRA": (engine_loop, {"method": "lora", "literal": True}),
    "Trainer, LoRA": (trainer_loop, {"method": "lora", "grouped": False}),
    "Trainer grouped by length, LoRA": (trainer_loop, {"method": "lora", "grouped": True}),
    "Trainer grouped by length, AdaLoRA": (trainer_loop, {"method": "adalora", "grouped": True}),
    LORA: (engine_loop, {"method": "lora"}),
    "engine, LoRA again": (engine_loop, {"method": "lora"}),
    "engine, AdaLoRA": (engine_loop, {"method": "adalora"}),
    "engine, FW-LoRA, measured step": (engine_loop, {"method": "fw_lora measuring"}),
    "engine, FW-LoRA, warm-up step between": (engine_loop, {"method": "fw_lora between"}),
    "engine, FW-LoRA, shrinkage step": (engine_loop, {"method": "fw_lora shrinking"}),
    "no adapter, no dropout": (backbone_loop, {"method": "none"}),
    "limit: matrix products alone": (limit_loop, {"method": "none"}),
}
GPU_LOOPS = {"engine, LoRA, CUDA graphs": (engine_loop, {"method": "lora", "cuda_graphs": True})}
PARTS = ["speed", "lengths", "memory", "trial", "profile"]
LIMIT = "limit: matrix products alone"


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray) -> Interval:
    """Ratio of two sums over the same rounds, with its 95 % interval over resampled rounds."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(numerator), (RESAMPLES, len(numerator)))
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def time_rounds(options: dict[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step by loop, shape (rounds,)."""
    chosen = {**LOOPS, **(GPU_LOOPS if options["device"] == "cuda" else {})}
    loops = {name: SteppedLoop(loop, {**options, **own}, SETTLING_STEPS) for name, (loop, own) in chosen.items()}
    for loop in loops.values():
        loop.settle()
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in track(range(rounds), description=f"{rounds} rounds of {len(loops)} steps"):
        for name in order.permutation(list(loops)):
            seconds[name].append(loops[name].step())
    for loop in loops.values():
        loop.close()
    return {name: np.array(values) for name, values in seconds.items()}


def whole_run(seconds: dict[str, np.ndarray]) -> np.ndarray:
    """FW-LoRA's seconds per step over SST-2's schedule, its kinds of step mixed as it takes them."""
    warmup = SCHEDULE["warmup_steps"] / SCHEDULE["total_steps"]
    measured = warmup / FisherWeighting().fisher_every
    return (
        measured * seconds["engine, FW-LoRA, measured step"]
        + (warmup - measured) * seconds["engine, FW-LoRA, warm-up step between"]
        + (1 - warmup) * seconds["engine, FW-LoRA, shrinkage step"]
    )


def summarize_speed(seconds: dict[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """Examples per second and the ratios that have targets."""
    seconds = {**seconds, "engine, FW-LoRA, whole run": whole_run(seconds)}
    rows = {}
    for name, values in seconds.items():
        rows[name] = {
            "examples_per_second": batch_size / values.mean(),
            "milliseconds_median": 1e3 * float(np.median(values)),
            "milliseconds_quartiles": [1e3 * float(v) for v in np.percentile(values, [25, 75])],
            "share_of_limit": vars(ratio_interval(seconds[LIMIT], values)),
            "time_to_engine_lora": vars(ratio_interval(values, seconds[LORA])),
        }
    engine, adalora = seconds[LORA], seconds["engine, AdaLoRA"]
    targets = {
        "share of the limit, at least 0.70": ratio_interval(seconds[LIMIT], engine),
        "times the Trainer, at least 4.3": ratio_interval(seconds["Trainer, LoRA"], engine),
        "times the Trainer grouped by length, at least 2.1": ratio_interval(
            seconds["Trainer grouped by length, LoRA"], engine
        ),
        "FW-LoRA's run to LoRA's, at most 1.01": ratio_interval(seconds["engine, FW-LoRA, whole run"], engine),
        "AdaLoRA: engine's time to the Trainer's, at most 1": ratio_interval(
            adalora, seconds["Trainer grouped by length, AdaLoRA"]
        ),
    }
    return {"loops": rows, "targets": {name: vars(interval) for name, interval in targets.items()}}


def measure_lengths(options: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds per step and real tokens per second, for examples of other mean lengths."""
    rows = []
    loops = {
        mean: {
            name: SteppedLoop(loop, {**options, "method": "lora", "mean_length": mean, "examples": 960}, SETTLING_STEPS)
            for name, loop in (("engine", engine_loop), ("limit", limit_loop))
        }
        for mean in MEAN_LENGTHS
    }
    for pair in loops.values():
        for loop in pair.values():
            loop.settle()
    for mean, pair in loops.items():
        seconds = {name: np.array([loop.step() for _ in range(18)]) for name, loop in pair.items()}
        rows.append({
            "mean_length": mean,
            "milliseconds_median": 1e3 * float(np.median(seconds["engine"])),
            "tokens_per_second": BATCH_SIZE * mean * len(seconds["engine"]) / float(seconds["engine"].sum()),
            "share_of_limit": float(seconds["limit"].sum() / seconds["engine"].sum()),
        })  # fmt: skip
        for loop in pair.values():
            loop.close()
    return rows


def measure_memory(glue: str) -> list[dict[str, float]]:
    """Peak resident memory of the program itself, data to last step, in a fresh process per number of examples."""
    rows = []
    for examples in MEMORY_EXAMPLES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training_memory", glue, str(examples)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY) for _ in range(3)]
        peaks = [float(run.stdout.split()[-1]) for run in runs]
        rows.append({
            "examples": examples, "peak_mib": float(np.median(peaks)), "lowest": min(peaks), "highest": max(peaks),
        })  # fmt: skip
    return rows


def measure_trial(glue: str, repeats: int = 5) -> dict[str, float]:
    """Seconds from shell to exit of trial mode with MiniLM."""
    seconds = []
    with tempfile.TemporaryDirectory() as results:
        command = [
            sys.executable, "-u", "-m", "src.main", "run=proposed-roberta-base-110M--SST-2-GLUE", "mode=trial",
            f"results_dir={results}", f"run.model.pretrained_id={MINILM}", f"run.dataset.name={glue}",
        ]  # fmt: skip
        for _ in range(repeats):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
            seconds.append(time.perf_counter() - started)
    return {"seconds_median": float(np.median(seconds)), "lowest": min(seconds), "highest": max(seconds)}


def show(results: dict[str, Any]) -> None:
    """Prints what was measured."""
    if "speed" in results:
        rows = [
            [
                name, f"{row['examples_per_second']:.1f}", f"{row['milliseconds_median']:.1f}",
                "{:.1f} .. {:.1f}".format(*row["milliseconds_quartiles"]), str(Interval(**row["share_of_limit"])),
                str(Interval(**row["time_to_engine_lora"])),
            ]
            for name, row in results["speed"]["loops"].items()
        ]  # fmt: skip
        columns = ["loop", "examples / s", "ms / step", "quartiles", "of the limit", "time / engine LoRA"]
        print_table("Speed on SST-2", columns, rows)
        targets = [[name, str(Interval(**value))] for name, value in results["speed"]["targets"].items()]
        print_table("Targets", ["ratio", "measured"], targets)
    if "lengths" in results:
        rows = [
            [f"{row['mean_length']}", f"{row['milliseconds_median']:.1f}", f"{row['tokens_per_second']:.0f}",
             f"{row['share_of_limit']:.3f}"]
            for row in results["lengths"]
        ]  # fmt: skip
        print_table("Cost by length", ["tokens per example", "ms / step", "tokens / s", "of the limit"], rows)
    if "memory" in results:
        rows = [
            [f"{row['examples']:,}", f"{row['peak_mib']:.0f}", f"{row['lowest']:.0f} .. {row['highest']:.0f}"]
            for row in results["memory"]
        ]
        print_table("Peak memory by size of the data", ["training examples", "MiB", "of 3"], rows)
    if "trial" in results:
        row = results["trial"]
        rows = [[f"{row['seconds_median']:.1f}", f"{row['lowest']:.1f} .. {row['highest']:.1f}"]]
        print_table("Trial mode, from shell to exit", ["s", "of 5"], rows)
    if "profile" in results:
        row = results["profile"]
        rows = [[kind, f"{value:.1f}", f"{value / row['milliseconds']:.1%}"] for kind, value in row["kinds"].items()]
        title = f"A step of 32 x 13 tokens: {row['milliseconds']:.1f} ms, {row['operations']} operations"
        print_table(title, ["kind of work", "ms", "share"], rows)
        rows = [[shape, f"{value:.2f}"] for shape, value in row["bf16_to_fp32"].items()]
        print_table("A product in bfloat16", ["weights", "time / float32"], rows)
    if "quality" in results:
        rows = [
            [row["task"], str(row["seeds"]), f"{np.mean(row['trainer']):.2f}", f"{np.mean(row['engine']):.2f}",
             "{estimate:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row["difference"])]
            for row in results["quality"]
        ]  # fmt: skip
        print_table("Quality, points", ["task", "seeds", "Trainer", "engine", "paired difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, help="folder with GLUE's SST-2 and CoLA in the Hub's layout")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--quality-runs", type=Path, help="what benchmarks.training_quality wrote")
    parser.add_argument("--model", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    glue = str(Path(arguments.glue).resolve())
    options: dict[str, Any] = {
        "glue": glue, "examples": BATCH_SIZE * (arguments.rounds + SETTLING_STEPS),
        "batch_size": BATCH_SIZE, "rank": RANK, "model": arguments.model, "device": arguments.device,
        "precision": "bf16" if arguments.device == "cuda" else "fp32",
    }  # fmt: skip
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results: dict[str, Any] = {}
    if "trial" in arguments.parts:
        results["trial"] = measure_trial(glue)
    if "memory" in arguments.parts:
        results["memory"] = measure_memory(glue)
    if "lengths" in arguments.parts:
        results["lengths"] = measure_lengths(options)
    if "profile" in arguments.parts:
        results["profile"] = {**profile_step(), "bf16_to_fp32": compare_precisions()}
    if "speed" in arguments.parts:
        results["speed"] = summarize_speed(time_rounds(options, arguments.rounds), BATCH_SIZE)
    if arguments.quality_runs:
        results["quality"] = summarize(read_runs(arguments.quality_runs))
    show(results)
    if arguments.json:
        settings = {**options, "glue": "SST-2", "rounds": arguments.rounds, "threads": torch.get_num_threads()}
        write_json(arguments.json, torch.device(arguments.device), settings, results)


if __name__ == "__main__":
    main()
