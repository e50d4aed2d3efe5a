"""Whether the engine trains as well as the Trainer does, and in bf16 as well as in float32: paired runs.

    uv run python -m benchmarks.training_quality --glue FOLDER --runs PATH [--tasks sst2 cola] [--loops trainer ...]

All start from the same head and adapters (seed), with the same optimizer, schedule and number of steps. The Trainer
draws batches at random and computes through PEFT in float32; the engine draws others at random and computes by its
fused path and compiled kernels, in either precision. Every finished run is appended to PATH as a line of JSON; what
PATH holds already is not run again, so that several processes may share the work by ``--loops`` and ``--tasks``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.common import Interval, make_lora_method
from benchmarks.glue_data import task_splits
from benchmarks.trainers import make_trainer
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import evaluate, train
from fwlora.experiment.engine.options import EngineOptions, Precision, TrainingOptions
from fwlora.experiment.engine.precision import DTYPES
from fwlora.experiment.engine.task import Task
from fwlora.experiment.fused.compiled import load_kernels
from fwlora.experiment.fused.forward import PlainClassifier

CPU = torch.device("cpu")
RANK = 8
BATCH_SIZE = 32
# task -> training examples (None: all), epochs, learning rate, paired seeds
TASKS: dict[str, tuple[int | None, int, float, int]] = {"sst2": (6_400, 1, 1e-3, 5), "cola": (None, 3, 1e-3, 10)}
TRAINER = "trainer"
# Loop -> precision, and whether batches hold examples of like length; the Trainer's are float32 and random.
LOOPS: dict[str, tuple[Precision, bool]] = {
    TRAINER: ("fp32", False),
    "engine fp32": ("fp32", False),
    "engine bf16": ("bf16", False),
    "engine fp32, by length": ("fp32", True),
    "engine bf16, by length": ("bf16", True),
}
# Of runs, by length, that were made before there were kernels, and are not made again.
EARLIER = "engine fp32 without kernels"
PAIRS = (
    (TRAINER, EARLIER), *((TRAINER, loop) for loop in LOOPS if loop != TRAINER), ("engine fp32", "engine bf16"),
    ("engine fp32, by length", "engine bf16, by length"), ("engine bf16, by length", "engine bf16"),
)  # fmt: skip
METRICS = {"sst2": "eval_accuracy", "cola": "eval_matthews_correlation"}


def training_options(seed: int, epochs: int, learning_rate: float) -> TrainingOptions:
    """Return the options of both loops."""
    return TrainingOptions(
        epochs=epochs,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        weight_decay=0.1,
        warmup_ratio=0.06,
        seed=seed,
    )


def train_once(loop: str, glue: str, task_name: str, seed: int) -> float:
    """The task's metric on GLUE's development split after the last epoch, in points."""
    examples, epochs, learning_rate, _ = TASKS[task_name]
    train_split, eval_split, pad_token_id = task_splits(glue, task_name, examples)
    model, method = make_lora_method("minilm", RANK, CPU, seed)
    task = Task(pad_token_id, 2, METRICS[task_name].removeprefix("eval_"))
    training = training_options(seed, epochs, learning_rate)
    if loop != TRAINER:
        precision, by_length = LOOPS[loop]
        kernels = load_kernels(DTYPES[precision])
        engine = EngineOptions(Processes(CPU), precision, group_by_length=by_length, kernels=kernels)
        result = train(model, method, train_split, eval_split, training, task, engine, log=lambda row: None)
        return 100 * result.last.values[METRICS[task_name]]
    make_trainer(model, train_split, pad_token_id, training).train()
    found = evaluate(PlainClassifier(model), eval_split, BATCH_SIZE, task, EngineOptions(Processes(CPU)))
    return 100 * found.values[METRICS[task_name]]


def read_runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(glue: str, tasks: list[str], loops: list[str], path: Path) -> None:
    """Runs what is not in ``path`` yet, the loops of a seed one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for seed in range(TASKS[task][-1]):
            for loop in loops:
                if (task, seed, loop) in {(run["task"], run["seed"], run["loop"]) for run in read_runs(path)}:
                    continue
                run = {"task": task, "seed": seed, "loop": loop, "metric": train_once(loop, glue, task, seed)}
                with path.open("a") as lines:
                    lines.write(json.dumps(run) + "\n")
                print(run, flush=True)


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per task and pair of loops: the values, and the mean paired difference with its 95 % t interval, in points."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for pair in PAIRS:
            found = [
                {run["seed"]: run["metric"] for run in runs if (run["task"], run["loop"]) == (task, loop)}
                for loop in pair
            ]
            seeds = sorted(set(found[0]) & set(found[1]))
            values = {loop: [each[seed] for seed in seeds] for loop, each in zip(pair, found, strict=True)}
            differences = np.array(values[pair[1]]) - np.array(values[pair[0]])
            interval = None
            if len(seeds) > 1:
                bounds = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
                interval = vars(Interval(float(differences.mean()), float(bounds.low), float(bounds.high)))
            row = {"task": task, "first": pair[0], "second": pair[1], "seeds": len(seeds), "values": values}
            rows.append({**row, "difference": interval})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, help="folder with GLUE's SST-2 and CoLA in the Hub's layout")
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    arguments = parser.parse_args()
    run_missing(arguments.glue, arguments.tasks, arguments.loops, arguments.runs)


if __name__ == "__main__":
    main()
