"""How fast the engine trains, against the Trainer, the model alone and the machine's limit, all interleaved in one run.

    uv run python -m benchmarks.training --glue FOLDER [--json PATH] [--rounds 200] [--parts speed methods ...]
                                         [--quality-runs PATH] [--model minilm|roberta-base] [--device cpu|cuda]

Every loop runs in a process of its own and takes a step when it is told to. A round is one step of each, in random
order; every loop goes once over the same examples of SST-2, as many as fill the rounds and twelve steps to settle, in
batches of its own. ``speed`` compares loops in both precisions: ratios are of sums over rounds, with an interval from
resampling whole rounds. ``methods`` compares the engine's methods in the faster precision, see ``training_methods``.
``--quality-runs`` joins what ``training_quality`` wrote to the table. Leave the machine idle.
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

from benchmarks.common import (
    MINILM,
    RESAMPLES,
    Interval,
    print_table,
    show_progress,
    write_json,
)
from benchmarks.stepping import SteppedLoop, take_rounds
from benchmarks.training_loops import backbone_loop, engine_loop, limit_loop, trainer_loop
from benchmarks.training_methods import summarize_methods, time_methods
from benchmarks.training_profile import PRODUCT_SHAPES, measure_joined, profile_step
from benchmarks.training_quality import read_runs, summarize
from benchmarks.training_startup import measure_side_by_side, measure_startup
from fwlora.experiment.engine.options import Precision
from fwlora.experiment.engine.precision import choose_precision, time_products
from fwlora.experiment.paths import REPOSITORY

BATCH_SIZE, RANK = 32, 8
SETTLING_STEPS = 12
# Enough to meet every shape that is compiled anew.
COMPILE_SETTLING_STEPS = 30
# Rounds of ``speed`` to those of one block of ``methods``.
METHOD_ROUNDS = 4
MEAN_LENGTHS = (8, 16, 32, 64, 128)
MEMORY_EXAMPLES = (1_000, 8_000, 67_349)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
TRAINER, GROUPED, ENGINE, LIMIT = "Trainer", "Trainer grouped by length", "engine", "limit: products alone"
IN_EACH_PRECISION: dict[str, tuple[Any, dict[str, Any]]] = {
    TRAINER: (trainer_loop, {"method": "lora", "grouped": False}),
    GROUPED: (trainer_loop, {"method": "lora", "grouped": True}),
    ENGINE: (engine_loop, {"method": "lora"}),
    LIMIT: (limit_loop, {"method": "none"}),
}
IN_THE_FASTER: dict[str, tuple[Any, dict[str, Any]]] = {
    "Trainer grouped by length, AdaLoRA": (trainer_loop, {"method": "adalora", "grouped": True}),
    "no adapter, no dropout": (backbone_loop, {"method": "none"}),
}
ON_CPU: dict[str, tuple[Any, dict[str, Any]]] = {
    "engine without compiled kernels": (engine_loop, {"method": "lora", "compiled": False}),
}
ON_GPU: dict[str, tuple[Any, dict[str, Any]]] = {
    "engine, CUDA graphs": (engine_loop, {"method": "lora", "cuda_graphs": True}),
}
PARTS = ["speed", "methods", "side_by_side", "startup", "lengths", "memory", "trial", "profile", "joined", "compile"]


def choose_loops(device: str, faster: Precision) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The loops of ``speed`` by name: those of :data:`IN_EACH_PRECISION` with their precision behind it."""
    loops = {
        f"{name}, {precision}": (loop, {**own, "precision": precision})
        for name, (loop, own) in IN_EACH_PRECISION.items()
        for precision in PRECISIONS
    }
    others = {**IN_THE_FASTER, **(ON_GPU if device == "cuda" else ON_CPU)}
    return {**loops, **{name: (loop, {**own, "precision": faster}) for name, (loop, own) in others.items()}}


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray) -> Interval:
    """Ratio of two sums over the same rounds, with its 95 % interval over resampled rounds."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(numerator), (RESAMPLES, len(numerator)))
    ratios = numerator[drawn].sum(1) / denominator[drawn].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def time_rounds(
    chosen: dict[str, tuple[Any, dict[str, Any]]], options: dict[str, Any], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds per step by loop, shape (rounds,)."""
    own_options = {"examples": BATCH_SIZE * (rounds + SETTLING_STEPS), **options}
    loops = {
        name: SteppedLoop(loop, {**own_options, **own}, SETTLING_STEPS).settle()
        for name, (loop, own) in show_progress(chosen.items(), description=f"{len(chosen)} loops settle")
    }
    return take_rounds(loops, show_progress(range(rounds), description=f"{rounds} rounds of {len(loops)} steps"))


def summarize_speed(seconds: dict[str, np.ndarray], faster: Precision, batch_size: int) -> dict[str, Any]:
    """Examples per second and the ratios that have targets; the Trainer may take the precision that it is faster in."""
    engine = seconds[f"{ENGINE}, {faster}"]
    limits = {precision: seconds[f"{LIMIT}, {precision}"] for precision in PRECISIONS}
    rows = {}
    for name, values in seconds.items():
        precision = next((each for each in PRECISIONS if name.endswith(each)), faster)
        rows[name] = {
            "examples_per_second": batch_size / values.mean(),
            "milliseconds_median": 1e3 * float(np.median(values)),
            "milliseconds_quartiles": [1e3 * float(v) for v in np.percentile(values, [25, 75])],
            "share_of_limit": vars(ratio_interval(limits[precision], values)),
            "time_to_engine": vars(ratio_interval(values, engine)),
        }
    trainer, grouped = (
        min((seconds[f"{name}, {precision}"] for precision in PRECISIONS), key=np.sum) for name in (TRAINER, GROUPED)
    )
    targets = {
        "share of the limit, at least 0.70": ratio_interval(limits[faster], engine),
        "times the Trainer, at least 5": ratio_interval(trainer, engine),
        "times the Trainer grouped by length, at least 2.3": ratio_interval(grouped, engine),
    }
    return {"loops": rows, "targets": {name: vars(interval) for name, interval in targets.items()}}


def measure_lengths(options: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds per step and real tokens per second, for examples of other mean lengths."""
    rows = []
    for mean in MEAN_LENGTHS:
        own = {**options, "method": "lora", "mean_length": mean, "examples": 960}
        pair = {
            name: SteppedLoop(loop, own, SETTLING_STEPS).settle()
            for name, loop in (("engine", engine_loop), ("limit", limit_loop))
        }
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


def measure_compile(options: dict[str, Any], rounds: int = 60) -> dict[str, Any]:
    """Step times of the engine, of its layers by torch's operations, and of PEFT's model under ``torch.compile``."""
    own = {**options, "method": "lora", "examples": BATCH_SIZE * (rounds + COMPILE_SETTLING_STEPS)}
    loops, settled = {}, {}
    for name, more in {
        ENGINE: {}, "engine without compiled kernels": {"compiled": False},
        "model under torch.compile": {"compiled": False, "torch_compile": True},
    }.items():  # fmt: skip
        started = time.perf_counter()
        loops[name] = SteppedLoop(engine_loop, {**own, **more}, COMPILE_SETTLING_STEPS).settle()
        settled[name] = time.perf_counter() - started
    seconds = take_rounds(loops, range(rounds))
    return {
        name: {
            "milliseconds_median": 1e3 * float(np.median(values)),
            "time_to_engine": vars(ratio_interval(values, seconds[ENGINE])),
            "settle_s": settled[name],
        }
        for name, values in seconds.items()
    }


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
    for part, ratio in (("speed", "time_to_engine"), ("methods", "time_to_lora")):
        if part not in results:
            continue
        rows = []
        for name, row in results[part]["loops"].items():
            rate = [f"{row['examples_per_second']:.1f}"] if part == "speed" else []
            share = [str(Interval(**row["share_of_limit"]))] if part == "speed" else []
            quartiles = "{:.1f} .. {:.1f}".format(*row["milliseconds_quartiles"])
            rows.append(
                [name, *rate, *share, f"{row['milliseconds_median']:.1f}", quartiles, str(Interval(**row[ratio]))]
            )
        first = ["loop", "examples / s", "of the limit"] if part == "speed" else ["method"]
        print_table(f"{part.capitalize()} on SST-2", [*first, "ms / step", "quartiles", ratio.replace("_", " ")], rows)
        targets = [[name, str(Interval(**value))] for name, value in results[part]["targets"].items()]
        print_table("Targets", ["ratio", "measured"], targets)
    if "side_by_side" in results:
        row = results["side_by_side"]
        title = f"{row['cores']} runs of one thread against one of {row['cores']} threads"
        print_table(title, ["", ""], [["steps per second, ratio", str(Interval(**row["ratio"]))]])
    if "compile" in results:
        rows = [
            [
                name,
                f"{row['milliseconds_median']:.1f}",
                str(Interval(**row["time_to_engine"])),
                f"{row['settle_s']:.0f}",
            ]
            for name, row in results["compile"].items()
        ]
        print_table("The model compiled by torch", ["loop", "ms / step", "time / engine", "s to settle"], rows)
    if "joined" in results:
        rows = [[count, f"{ratio:.2f}"] for count, ratio in results["joined"].items()]
        print_table("R steps of 32 examples to one of 32 R", ["R", "times"], rows)
    if "startup" in results:
        rows = [
            [name, f"{row['seconds_median']:.2f}", f"{row['lowest']:.2f} .. {row['highest']:.2f}"]
            for name, row in results["startup"].items()
        ]
        print_table("From shell to first step", ["start", "s", "range"], rows)
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
    for row in results.get("profile", []):
        rows = [[kind, f"{value:.1f}", f"{value / row['milliseconds']:.1%}"] for kind, value in row["kinds"].items()]
        step = f"a step of 32 x 13 tokens in {row['milliseconds']:.1f} ms, {row['operations']} operations"
        print_table(f"{row['name']}: {step}", ["kind of work", "ms", "share"], rows)
    if "quality" in results:
        rows = [
            [
                f"{row['task']}, {row['second']} - {row['first']}",
                str(row["seeds"]),
                *(f"{np.mean(row['values'][loop]):.2f}" for loop in (row["first"], row["second"])),
                "{estimate:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row["difference"]),
            ]
            for row in results["quality"]
            if row["difference"]
        ]
        print_table("Quality, points", ["pairs", "seeds", "second", "first", "difference"], rows)


def measure(parts: list[str], options: dict[str, Any], faster: Precision, rounds: int) -> dict[str, Any]:
    """The results of the chosen parts."""
    options = {**options, "precision": faster}
    found: dict[str, Any] = {}
    if "trial" in parts:
        found["trial"] = measure_trial(options["glue"])
    if "startup" in parts:
        found["startup"] = measure_startup(options["glue"])
    if "memory" in parts:
        found["memory"] = measure_memory(options["glue"])
    if "lengths" in parts:
        found["lengths"] = measure_lengths(options)
    if "profile" in parts:
        found["profile"] = [
            profile_step(precision, compiled=each) for precision in PRECISIONS for each in (False, True)
        ]
    if "joined" in parts:
        found["joined"] = measure_joined(faster)
    if "compile" in parts:
        found["compile"] = measure_compile(options)
    if "side_by_side" in parts:
        found["side_by_side"] = measure_side_by_side({**options, "method": "lora", "examples": BATCH_SIZE * rounds})
    if "methods" in parts:
        found["methods"] = summarize_methods(time_methods(options, max(1, rounds // METHOD_ROUNDS)))
    if "speed" in parts:
        seconds = time_rounds(choose_loops(options["device"], faster), options, rounds)
        found["speed"] = summarize_speed(seconds, faster, BATCH_SIZE)
    return found


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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = torch.device(arguments.device)
    timings = time_products(PRODUCT_SHAPES[arguments.model], device)
    faster, told = choose_precision("bf16", lambda: timings)
    print(told)
    options: dict[str, Any] = {
        "glue": str(Path(arguments.glue).resolve()), "batch_size": BATCH_SIZE, "rank": RANK, "model": arguments.model,
        "device": arguments.device,
    }  # fmt: skip
    results: dict[str, Any] = {"product_seconds": timings}
    results |= measure(arguments.parts, options, faster, arguments.rounds)
    if arguments.quality_runs:
        results["quality"] = summarize(read_runs(arguments.quality_runs))
    show(results)
    if arguments.json:
        settings = {**options, "glue": "SST-2", "precision": faster, "rounds": arguments.rounds}
        write_json(arguments.json, device, {**settings, "threads": torch.get_num_threads()}, results)


if __name__ == "__main__":
    main()
