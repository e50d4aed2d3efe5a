"""One part of what ``benchmarks/gpu.sh`` measures on a GPU: ``python -m benchmarks.gpu PART --json PATH [--rehearse]``.

RoBERTa-base with random weights in bf16, batches of 32 random examples of 13 tokens in the mean. Needs the library, the
engine, torch, transformers and PEFT; neither Hydra nor W&B nor Optuna nor a network. ``--rehearse`` runs the same code
on the CPU with a tiny model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Interval, median_interval, print_table, show_progress, write_json
from benchmarks.stepping import SteppedLoop, take_rounds
from benchmarks.training_loops import engine_loop, limit_loop, trainer_loop
from benchmarks.training_startup import steps_per_second
from fwlora.experiment.paths import REPOSITORY

TESTS = "tests/experiment/engine/test_gpu.py"
SETTLING_STEPS, ROUNDS = 12, 60
LORA, GRAPHS = "engine, LoRA", "engine, LoRA, CUDA graphs"
LOOPS: dict[str, tuple[Any, dict[str, Any]]] = {
    LORA: (engine_loop, {"method": "lora"}),
    GRAPHS: (engine_loop, {"method": "lora", "cuda_graphs": True}),
    "limit: products alone": (limit_loop, {"method": "none"}),
    "engine, FW-LoRA, shrinkage step": (engine_loop, {"method": "fw_lora shrinking"}),
    "engine, FW-LoRA, shrinkage step, CUDA graphs": (engine_loop, {"method": "fw_lora shrinking", "cuda_graphs": True}),
    "engine, FW-LoRA, measured step": (engine_loop, {"method": "fw_lora measuring"}),
    "engine, LoRA, model compiled by torch": (engine_loop, {"method": "lora", "torch_compile": True}),
    "Trainer grouped by length, LoRA": (trainer_loop, {"method": "lora", "grouped": True}),
    "engine, AdaLoRA": (engine_loop, {"method": "adalora"}),
}
SIDE_BY_SIDE = (1, 2, 4, 8)
REHEARSED = 2  # loops, runs side by side and rounds


def run_tests(options: dict[str, Any]) -> dict[str, Any]:
    """The engine's own GPU tests; without a GPU they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    return {"exit_code": done.returncode, "outcome": lines[-1] if lines else ""}


def time_training(options: dict[str, Any]) -> dict[str, Any]:
    """Step times of the loops, interleaved; a loop that fails says why and leaves the others alone."""
    chosen = dict([*LOOPS.items()][: REHEARSED if options["rehearse"] else None])
    rounds = REHEARSED if options["rehearse"] else ROUNDS
    loops: dict[str, SteppedLoop] = {}
    failed: dict[str, str] = {}
    for name in show_progress([*chosen], f"{len(chosen)} loops settle"):
        loop, own = chosen[name]
        try:
            loops[name] = SteppedLoop(loop, {**options, **own}, SETTLING_STEPS).settle()
        except (RuntimeError, EOFError) as error:
            failed[name] = str(error)
    seconds = take_rounds(loops, range(rounds))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "milliseconds_median": 1e3 * float(np.median(values)),
            "milliseconds_quartiles": [1e3 * float(value) for value in np.percentile(values, [25, 75])],
            "time_to_lora": vars(median_interval(values / seconds[LORA])),
        }
        for name, values in seconds.items()
    }
    shown = [
        [name, f"{row['milliseconds_median']:.1f}", str(Interval(**row["time_to_lora"]))] for name, row in rows.items()
    ]
    print_table("Training", ["loop", "ms / step", "time / LoRA"], [*shown, *([name, "failed", ""] for name in failed)])
    return {"loops": rows, "failed": failed}


def time_side_by_side(options: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of several runs on one device, with and without CUDA graphs."""
    counts = SIDE_BY_SIDE[:REHEARSED] if options["rehearse"] else SIDE_BY_SIDE
    found: dict[str, dict[str, float]] = {}
    for name in (LORA, GRAPHS):
        own = LOOPS[name][1]
        loops = [SteppedLoop(engine_loop, {**options, **own}, SETTLING_STEPS).settle() for _ in range(counts[-1])]
        steps = REHEARSED if options["rehearse"] else 100
        found[name] = {str(count): steps_per_second(loops[:count], steps) for count in counts}
        for loop in loops:
            loop.close()
    rows = [[name, *(f"{rate:.1f}" for rate in rates.values())] for name, rates in found.items()]
    print_table("Steps per second of runs side by side", ["loop", *map(str, counts)], rows)
    return {"steps_per_second": found}


PARTS = {"tests": run_tests, "training": time_training, "side_by_side": time_side_by_side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    rehearse = arguments.rehearse
    options: dict[str, Any] = {
        "rehearse": rehearse,
        "device": "cpu" if rehearse else "cuda", "model": "tiny" if rehearse else "roberta-base",
        "precision": "fp32" if rehearse else "bf16", "batch_size": 4 if rehearse else 32, "rank": 8,
        "mean_length": 13, "examples": 160 if rehearse else 32 * 400,
    }  # fmt: skip
    found = PARTS[arguments.part](options)
    write_json(arguments.json, torch.device(options["device"]), options, {arguments.part: found})
    if found.get("exit_code"):
        sys.exit(1)


if __name__ == "__main__":
    main()
