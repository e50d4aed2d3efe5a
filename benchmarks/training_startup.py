"""What a run costs before its first step, and what runs side by side gain; used by ``benchmarks.training``."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from typing import Any

import numpy as np

from benchmarks.common import MINILM, median_interval
from benchmarks.stepping import SteppedLoop
from benchmarks.training_loops import engine_loop
from fwlora.experiment.paths import REPOSITORY
from fwlora.experiment.programs import Program, WarmServer, start_program

STARTS = 10
BLOCKS, STEPS_PER_BLOCK, SETTLING_STEPS = 12, 10, 12


def measure_startup(glue: str) -> dict[str, dict[str, float]]:
    """Seconds from the shell to the first step's line of a recorded run of MiniLM on SST-2, anew and from a fork."""
    server = WarmServer()
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as results:
        arguments = [
            "run=comparative-1-roberta-base-110M--SST-2-GLUE", "mode=full", f"results_dir={results}",
            "wandb.mode=offline", f"run.model.pretrained_id={MINILM}", f"run.dataset.name={glue}",
            "run.dataset.train_examples=32", "run.dataset.eval_examples=8", "run.training.epochs=1",
            "run.optuna.n_trials=0",
        ]  # fmt: skip
        # The first fork waits for the imports, and either start fills caches that the others find.
        _seconds_to_first_step(server.start("src.main", arguments, os.environ, REPOSITORY), time.perf_counter())
        for _ in range(STARTS):
            for name, start in (("cold", start_program), ("warm", server.start)):
                began = time.perf_counter()
                seconds[name].append(
                    _seconds_to_first_step(start("src.main", arguments, os.environ, REPOSITORY), began)
                )
    return {
        name: {"seconds_median": float(np.median(found)), "lowest": min(found), "highest": max(found)}
        for name, found in seconds.items()
    }


def _seconds_to_first_step(program: Program, began: float) -> float:
    with program:
        assert program.stdout is not None
        lines = []
        for line in program.stdout:
            lines.append(line)
            if line.startswith("step "):
                found = time.perf_counter() - began
    if program.returncode:
        raise RuntimeError("".join(lines))
    return found


def measure_side_by_side(options: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of one run per core, a thread each, to those of one run on all cores, in alternating blocks."""
    cores = len(os.sched_getaffinity(0))
    counts = [cores] + [1] * cores
    loops = [SteppedLoop(engine_loop, {**options, "threads": count}, SETTLING_STEPS).settle() for count in counts]
    rates: dict[str, list[float]] = {"joint": [], "apart": []}
    for _ in range(BLOCKS):
        rates["joint"].append(steps_per_second(loops[:1]))
        rates["apart"].append(steps_per_second(loops[1:]))
    for loop in loops:
        loop.close()
    ratios = np.array(rates["apart"]) / np.array(rates["joint"])
    return {"cores": cores, "ratio": vars(median_interval(ratios)), **rates}


def steps_per_second(loops: list[SteppedLoop], steps: int = STEPS_PER_BLOCK) -> float:
    """Rate of all loops together, each taking its steps as fast as it can."""

    def take_steps(loop: SteppedLoop) -> None:
        for _ in range(steps):
            loop.step()

    workers = [threading.Thread(target=take_steps, args=(loop,)) for loop in loops]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(loops) * steps / (time.perf_counter() - began)
