"""Runs that are killed at random moments and continued by the same command, against runs that were left alone.

    uv run python -m benchmarks.faults [--kills 200] [--json PATH] [--parts kills cost resume]

MiniLM on the quickstart's acceptability task, 640 training and 200 evaluation examples, two epochs of 20 steps; every
method, a third of the runs with a search of two trials before. ``kills``: SIGKILL to all processes of a run, up to five
times in a row at moments that are uniform over its length, then a start that is left alone; the adapter's files, every
logged row and the summary without its times have to be those of a run that was never killed. ``cost``: steps with
checkpoints far more often than by default, interleaved with steps without. ``resume``: from the shell to the first line
of progress, of new runs and of continued ones.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import Interval, print_table, show_progress, write_json
from benchmarks.stepping import Gate, SteppedLoop, take_rounds
from benchmarks.training_loops import Gated, load, make_method
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.paths import REPOSITORY
from fwlora.experiment.programs import WarmServer, start_program
from fwlora.experiment.resume.checkpointer import EVERY_S, Checkpointer, History
from fwlora.experiment.resume.store import CheckpointStore
from fwlora.experiment.stopping import Stopper
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.wandb.reading import WandbSource

PARTS = ("kills", "cost", "resume")
MOST_KILLS_IN_A_ROW = 5
TASK = "minilm-L6--acceptability"
LENGTH = (
    "run.dataset.train_examples=640", "run.dataset.eval_examples=200", "run.training.epochs=2", "wandb.mode=offline",
    "engine.precision=fp32", "run.training.mixed_precision=fp32",
)  # fmt: skip
WARMUP = "run.fw_lora.warmup_steps=12"
METHODS = {
    "head alone": ("comparative-1", ["run.model.lora.enabled=false"]),
    "LoRA": ("comparative-1", []),
    "AdaLoRA": ("comparative-2", []),
    "FW-LoRA, sketch": ("proposed", [WARMUP]),
    "FW-LoRA, exact": ("proposed", [WARMUP, "run.fw_lora.estimator=exact"]),
    "FW-LoRA, adapter": ("proposed", [WARMUP, "run.fw_lora.estimator=adapter"]),
    "FW-LoRA, reallocation": ("proposed", [WARMUP, "run.fw_lora.allocation=reallocate"]),
    "uniform shrinkage": ("comparative-3", [WARMUP]),
}
SEARCH = ["run.optuna.n_trials=2", "run.optuna.epochs=1", "run.optuna.train_examples=160"]
NO_SEARCH = ["run.optuna.n_trials=0"]
# What a run printed last, by how the line starts, and what it does then.
PHASES = {
    "computing": "loading", "run ": "loading", "data ": "loading", "budget": "loading", "attempt": "loading",
    "W&B": "starting to record", "search: trial": "search", "search": "search", "parameters": "training",
    "step": "training", "eval": "ending", "": "imports",
}  # fmt: skip
# Steps between two checkpoints of the loop whose cost is measured.
STEPS_PER_CHECKPOINT = 5


@dataclass
class Run:
    """A run of one method in a results folder of its own, started from a process that imported everything.

    Args:
        server: forks it.
        results: the folder.
        method: of :data:`METHODS`.
        searched: whether a search comes before.
    """

    server: WarmServer
    results: Path
    method: str
    searched: bool
    lines: list[str] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        return f"{METHODS[self.method][0]}-{TASK}"

    def arguments(self) -> list[str]:
        search = SEARCH if self.searched else NO_SEARCH
        return [
            f"run={self.run_id}",
            "mode=full",
            f"results_dir={self.results}",
            *LENGTH,
            *METHODS[self.method][1],
            *search,
        ]

    def start(self, kill_after_s: float | None = None) -> int:
        """Start it, and kill all its processes after a while; return the exit code of ``src.main``."""
        program = self.server.start("src.main", self.arguments(), os.environ, REPOSITORY)
        killer = None
        if kill_after_s is not None:
            killer = threading.Timer(kill_after_s, _kill_all, [program.pid])
            killer.start()
        self.lines = []
        with program:
            assert program.stdout is not None
            self.lines += [line.rstrip("\n") for line in program.stdout]
        if killer is not None:
            killer.cancel()
        return int(program.returncode or 0)

    def found(self) -> dict[str, Any]:
        """What two runs of the same settings share to the byte."""
        (record,) = WandbSource(self.results, "files", "gengaru617-personal", "251106-test").load([self.run_id])
        folder = self.results / self.run_id / "adapter"
        # The card names the command, which names the folder.
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md")
        return {
            "adapter": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "history": list(record.history),
            "summary": {name: value for name, value in record.summary.items() if name not in metrics.VARYING},
            "state": record.state,
        }


def _kill_all(pid: int) -> None:
    with suppress(psutil.Error):
        program = psutil.Process(pid)
        for process in [*program.children(recursive=True), program]:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


def name_phase(lines: list[str]) -> str:
    """What a run was doing when it had printed these lines."""
    last = lines[-1] if lines else ""
    return next(phase for start, phase in PHASES.items() if last.startswith(start))


def measure_kills(kills: int, folder: Path) -> dict[str, Any]:
    """Kill runs, continue them, compare them."""
    server, generator = WarmServer(), random.Random(0)
    kinds = [(method, number % 3 == 2) for number, method in enumerate(METHODS)]
    kinds += [("FW-LoRA, sketch", True), ("AdaLoRA", True)]
    whole: dict[tuple[str, bool], tuple[float, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    made = 0
    while made < kills:
        kind = kinds[len(rows) % len(kinds)]
        if kind not in whole:
            left_alone = Run(server, folder / f"whole-{len(whole)}", *kind)
            started = time.monotonic()
            code = left_alone.start()
            if code:
                raise RuntimeError("\n".join(left_alone.lines))
            whole[kind] = (time.monotonic() - started, left_alone.found())
        lasts_s, expected = whole[kind]
        run, phases = Run(server, folder / f"killed-{len(rows)}", *kind), []
        for _ in range(min(generator.randint(1, MOST_KILLS_IN_A_ROW), kills - made)):
            code = run.start(kill_after_s=generator.uniform(0.0, lasts_s))
            if code == 0:
                break
            phases.append(name_phase(run.lines))
        made += len(phases)
        code = run.start()
        same = code == 0 and run.found() == expected
        rows.append({"method": kind[0], "searched": kind[1], "phases": phases, "exit_code": code, "same": same})
        print(f"{made} kills, {sum(row['same'] for row in rows)} of {len(rows)} runs the same", flush=True)
    by_phase = Counter(phase for row in rows for phase in row["phases"])
    by_method = {
        method: {
            "runs": sum(row["method"] == method for row in rows),
            "kills": sum(len(row["phases"]) for row in rows if row["method"] == method),
            "same": sum(row["same"] for row in rows if row["method"] == method),
        }
        for method in METHODS
    }
    return {"kills": made, "runs": len(rows), "same": sum(row["same"] for row in rows), "by_phase": dict(by_phase),
            "by_method": by_method, "rows": rows}  # fmt: skip


class StepCheckpointer(TrainingWatch):
    """Save every few steps, whatever the time.

    Args:
        checkpointer: that saves.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def after_step(self, state: Any) -> None:
        if state.position.step % STEPS_PER_CHECKPOINT == 0:
            self._checkpointer.save(state)


def saving_loop(gate: Gate, options: dict[str, Any]) -> None:
    """The engine, with checkpoints where ``options["saved"]`` says so; a history of a run of SST-2's length."""
    train_split, eval_split, task, settings, device = load(options)
    model, method = make_method(options, device)
    processes, watch = Processes(device), TrainingWatch()
    history = History(lambda row: None)
    if options["saved"]:
        for step in range(6_315):
            history.add({"global_step": step, "train_loss": step / 7, "gradient_norm": step / 3, "penalty": step / 11,
                         "learning_rate": 1e-3 / (step + 1), "fisher_warmup": 0.0, "epoch": step / 2105})  # fmt: skip
        folder = Path(tempfile.mkdtemp(prefix="fwlora-checkpoints-"))
        watch = StepCheckpointer(Checkpointer(CheckpointStore(folder), history, {}, processes, Stopper()))
    gated: Any = Gated(method, gate)
    train(
        model, gated, train_split, eval_split.select(np.arange(64)), settings, task, EngineOptions(processes),
        log=history.add, watch=watch,
    )  # fmt: skip


def measure_cost(rounds: int = 200) -> dict[str, Any]:
    """Milliseconds of a checkpoint, and its share of a run at the default interval."""
    options = {
        "mean_length": 13, "examples": 32 * (rounds + 12), "batch_size": 32, "rank": 8, "model": "minilm",
        "device": "cpu", "precision": "fp32", "method": "fw_lora shrinking",
    }  # fmt: skip
    loops = {
        name: SteppedLoop(saving_loop, {**options, "saved": name == "saved"}, 12).settle()
        for name in ("plain", "saved")
    }
    seconds = take_rounds(loops, show_progress(range(rounds), f"{rounds} rounds"))
    # One block of steps holds one checkpoint.
    blocks = (seconds["saved"] - seconds["plain"]).reshape(-1, STEPS_PER_CHECKPOINT).sum(1)
    drawn = np.random.default_rng(0).choice(blocks, (5_000, len(blocks))).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    each = {"estimate": 1e3 * float(blocks.mean()), "low": 1e3 * float(low), "high": 1e3 * float(high)}
    return {
        "checkpoint_ms": each,
        "every_s": EVERY_S,
        "share": {name: value / 1e3 / EVERY_S for name, value in each.items()},
    }


def measure_resume(folder: Path, repeats: int = 5) -> dict[str, list[float]]:
    """Seconds from the shell to the first line of progress, of new runs and of continued ones, in turn."""
    found: dict[str, list[float]] = {"new": [], "continued": []}
    for number in range(repeats):
        run = Run(WarmServer(), folder / f"resume-{number}", "FW-LoRA, sketch", False)
        for kind in found:
            started = time.monotonic()
            arguments = [each for each in run.arguments() if "epochs" not in each]
            environment: Mapping[str, str] = os.environ
            with start_program("src.main", [*arguments, "run.training.epochs=40"], environment, REPOSITORY) as program:
                assert program.stdout is not None
                for line in program.stdout:
                    if line.startswith("step "):
                        found[kind].append(time.monotonic() - started)
                        break
                time.sleep(3.0)
                program.terminate()
                program.stdout.read()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fwlora-faults-") as folder:
        if "kills" in arguments.parts:
            results["kills"] = found = measure_kills(arguments.kills, Path(folder))
            rows = [
                [name, *(str(row[key]) for key in ("runs", "kills", "same"))]
                for name, row in found["by_method"].items()
            ]
            rows.append(["all", str(found["runs"]), str(found["kills"]), str(found["same"])])
            print_table("Killed and continued", ["method", "runs", "kills", "same bytes"], rows)
            print_table("Kills by phase", ["phase", "kills"], [[k, str(v)] for k, v in found["by_phase"].items()])
        if "cost" in arguments.parts:
            results["cost"] = cost = measure_cost()
            each, share = Interval(**cost["checkpoint_ms"]), Interval(**cost["share"])
            print_table(
                "Checkpoints", ["", ""], [["ms each", str(each)], [f"share, one every {EVERY_S:g} s", str(share)]]
            )
        if "resume" in arguments.parts:
            results["resume"] = seconds = measure_resume(Path(folder))
            rows = [[name, f"{statistics.median(values):.2f}", f"{min(values):.2f} .. {max(values):.2f}"]
                    for name, values in seconds.items()]  # fmt: skip
            print_table("From shell to first line of progress", ["run", "s", "range"], rows)
    if arguments.json:
        settings = {"kills": arguments.kills, "task": TASK, "threads": torch.get_num_threads()}
        write_json(arguments.json, torch.device("cpu"), settings, results)


if __name__ == "__main__":
    main()
