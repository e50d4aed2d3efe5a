"""What the engine's methods cost beside plain LoRA: a part of ``benchmarks.training``.

Two processes of one and the same loop may differ by a percent all their lives, which no interval over rounds knows of.
Every block therefore starts all processes anew and takes rounds of one step each, in random order. A block gives the
median of its rounds' ratios to LoRA; intervals are over blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from benchmarks.common import Interval, show_progress
from benchmarks.overhead import SCHEDULE
from benchmarks.stepping import SteppedLoop, take_rounds
from benchmarks.training_loops import engine_loop
from fwlora import FisherWeighting

BLOCKS = 16
LORA, AGAIN, ADALORA = "LoRA", "LoRA again", "AdaLoRA"
MEASURED, BETWEEN, SHRINKING = (f"FW-LoRA, {kind} step" for kind in ("measured", "unmeasured", "shrinkage"))
METHODS: dict[str, dict[str, Any]] = {
    LORA: {"method": "lora"},
    AGAIN: {"method": "lora"},
    ADALORA: {"method": "adalora"},
    MEASURED: {"method": "fw_lora measuring"},
    BETWEEN: {"method": "fw_lora between"},
    SHRINKING: {"method": "fw_lora shrinking"},
}
SETTLING_STEPS = 12


def blocks_interval(values: np.ndarray) -> Interval:
    """Mean over blocks, shape (blocks,), with its 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def time_methods(options: dict[str, Any], rounds: int, blocks: int = BLOCKS) -> dict[str, np.ndarray]:
    """Seconds per step by method, shape (blocks, rounds); the examples are those of ``rounds`` steps."""
    own_options = {"examples": options["batch_size"] * (rounds + SETTLING_STEPS), **options}
    every = FisherWeighting().fisher_every
    chosen = {name: own for name, own in METHODS.items() if name != BETWEEN or every > 1}
    found: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    for block in show_progress(range(blocks), description=f"{blocks} blocks of {rounds} rounds, {len(chosen)} methods"):
        loops = {
            name: SteppedLoop(engine_loop, {**own_options, **own}, SETTLING_STEPS).settle()
            for name, own in chosen.items()
        }
        for name, seconds in take_rounds(loops, range(rounds), seed=block).items():
            found[name].append(seconds)
    return {name: np.stack(each) for name, each in found.items()}


def summarize_methods(seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ratios to LoRA's step by method, and FW-LoRA's whole run over SST-2's schedule; see :func:`time_methods`."""
    ratios = {name: np.median(values / seconds[LORA], axis=1) for name, values in seconds.items()}
    rows = {
        name: {
            "milliseconds_median": 1e3 * float(np.median(values)),
            "milliseconds_quartiles": [1e3 * float(v) for v in np.percentile(values, [25, 75])],
            "blocks": ratios[name].tolist(),
            "time_to_lora": vars(blocks_interval(ratios[name])),
        }
        for name, values in seconds.items()
    }
    warmup = SCHEDULE["warmup_steps"] / SCHEDULE["total_steps"]
    measured = warmup / FisherWeighting().fisher_every
    whole = measured * ratios[MEASURED] + (1 - warmup) * ratios[SHRINKING]
    if BETWEEN in ratios:
        whole = whole + (warmup - measured) * ratios[BETWEEN]
    targets = {
        "FW-LoRA's whole run to LoRA's, at most 1.01": blocks_interval(whole),
        "AdaLoRA's to LoRA's, at most 1.10": blocks_interval(ratios[ADALORA]),
    }
    return {"loops": rows, "targets": {name: vars(interval) for name, interval in targets.items()}}
