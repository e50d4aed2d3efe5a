"""Which precision a machine multiplies fastest in, found by timing a model's products."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fwlora.experiment.engine.options import Precision
from fwlora.experiment.files import write_files
from fwlora.experiment.tracking.environment import name_cpu

# Part of every key of the cache; it changes with what is measured.
FORMAT = 1
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rounding to bfloat16 has to be worth something: products are not all of a step.
WORTHWHILE = 0.9
# Enough on a GPU for the time of a product to be more than that of starting it.
ROWS = {"cpu": 128, "cuda": 4096}
MOST_OPERATIONS = {"cpu": 4e8, "cuda": 1e11}
MEASURING_TIME_S = 0.06
LEAST_ROUNDS = 2

# Seconds of a model's products by precision.
Timings = Mapping[Precision, float]


def time_products(shapes: Sequence[tuple[int, int]], device: torch.device) -> dict[Precision, float]:
    """Return the seconds of X W^T over all shapes by precision: the least of interleaved rounds, within about 0.1 s.

    Args:
        shapes: (d_out, d_in) of the weights.
        device: to multiply on.
    """
    rows = ROWS[device.type]
    distinct = sorted(set(shapes), key=lambda shape: shape[0] * shape[1])
    # Of large models the smaller shapes are enough.
    while len(distinct) > 1 and 2.0 * rows * sum(out * inner for out, inner in distinct) > MOST_OPERATIONS[device.type]:
        distinct.pop()
    operands = {
        precision: [
            (torch.ones(rows, d_in, device=device, dtype=dtype), torch.ones(d_out, d_in, device=device, dtype=dtype))
            for d_out, d_in in distinct
        ]
        for precision, dtype in DTYPES.items()
    }
    for pairs in operands.values():
        _multiply(pairs, device)
    least = dict.fromkeys(operands, float("inf"))
    started, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - started < MEASURING_TIME_S:
        for precision, pairs in operands.items():
            least[precision] = min(least[precision], _multiply(pairs, device))
        rounds += 1
    return least


def choose_precision(preferred: Precision, measure: Callable[[], Timings]) -> tuple[Precision, str | None]:
    """Choose the precision to compute in: where ``bf16`` is allowed, the one that the products are faster in.

    Args:
        preferred: by the run's settings; ``fp32`` allows nothing else.
        measure: times the products; called only where there is a choice.

    Returns:
        The precision, and one line on why, where there was a choice.
    """
    if preferred == "fp32":
        return "fp32", None
    timings = measure()
    ratio = timings["bf16"] / timings["fp32"]
    told = f"a product in bf16 takes {ratio:.2f} times float32's time here"
    if ratio <= WORTHWHILE:
        return "bf16", f"computing in bf16: {told}"
    return "fp32", f"computing in float32, not bf16: {told}"


def cached_timings(
    folder: Path, shapes: Sequence[tuple[int, int]], device: torch.device, measure: Callable[[], Timings]
) -> Timings:
    """Return what ``measure`` found on this machine before, so that a machine's runs choose alike.

    Errors of the cache are treated as a miss.

    Args:
        folder: of the cache.
        shapes: as in :func:`time_products`.
        device: likewise.
        measure: times the products.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name_cpu()
    parts = [FORMAT, name, torch.__version__, torch.get_num_threads(), sorted(set(shapes))]
    path = folder / "precision" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        read = json.loads(path.read_text())
        found: Timings = {name: float(read[name]) for name in DTYPES}
        if all(0 < seconds < float("inf") for seconds in found.values()):
            return found
    measured = measure()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: json.dumps(dict(measured)).encode()})
    return measured


def _multiply(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for X, W in pairs:
        torch.mm(X, W.T)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
