"""Where a step of the engine goes, by kind of work; used by ``benchmarks.training``."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import make_lora_method
from benchmarks.overhead import draw_batch
from fwlora.experiment.engine.device import keep_freed_memory
from fwlora.experiment.engine.options import Precision
from fwlora.experiment.engine.precision import DTYPES
from fwlora.experiment.fused.compiled import Kernels, load_kernels
from fwlora.experiment.fused.forward import FastClassifier

TOKENS, BATCH_SIZE, RANK, STEPS = 13, 32, 8, 30
# Thin batched products have at most this many members; those of attention have one per example and head.
MOST_ADAPTERS = 3
PRODUCTS = {"mm", "addmm", "addmm_"}
BATCHED = {"bmm", "baddbmm", "baddbmm_"}
PRODUCT_SHAPES = {
    "minilm": [(384, 384), (1536, 384), (384, 1536)],
    "roberta-base": [(768, 768), (3072, 768), (768, 3072)],
}
DROPPING, ATTENTION = "drawing what is dropped", "attention"
NAMED = {
    **dict.fromkeys(("gelu", "gelu_backward"), "activation"),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward"), "normalization"),
    **dict.fromkeys(("cumsum", "log_"), DROPPING),
    **dict.fromkeys(("amax", "exp_", "div_", "sum", "addcmul_", "_softmax", "_softmax_backward_data"), ATTENTION),
    "_fused_adamw_": "optimizer",
    "index_fill_": "zeroing what is dropped",
}


class Timer(TorchDispatchMode):
    """Seconds by kind of work, of every operation that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        elapsed = time.perf_counter() - started
        self.seconds[classify(function.overloadpacket.__name__, args)] += elapsed
        self.calls += 1
        return result

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Count the block's compiled kernels too, by their names."""
        original = Kernels.__call__

        def call(kernels: Kernels, name: str, *arguments: Any) -> None:
            started = time.perf_counter()
            original(kernels, name, *arguments)
            self.seconds[f"kernel {name}"] += time.perf_counter() - started
            self.calls += 1

        with patch.object(Kernels, "__call__", call):
            yield


def classify(name: str, args: Any) -> str:
    """The kind of work of an operation."""
    if name in PRODUCTS:
        return "base layers' products"
    if name in BATCHED:
        members = next(arg.shape[0] for arg in reversed(args) if isinstance(arg, Tensor))
        return "adapters' products" if members <= MOST_ADAPTERS else ATTENTION
    if name in NAMED:
        return NAMED[name]
    sizes = [arg for arg in args if isinstance(arg, Tensor)]
    if sizes and sizes[0].dim() == 1 and name not in ("stack", "cat"):
        return DROPPING
    return "copies, sums and the rest"


def make_step(precision: Precision, *, compiled: bool, batch_size: int = BATCH_SIZE) -> Callable[[], float]:
    """A LoRA step of examples of 13 tokens with MiniLM, which returns its seconds."""
    keep_freed_memory()
    device = torch.device("cpu")
    model, method = make_lora_method("minilm", RANK, device, 0)
    kernels = load_kernels(DTYPES[precision]) if compiled else None
    classifier = FastClassifier(model, method.pairs, precision, kernels=kernels).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch, labels = draw_batch(TOKENS, batch_size, 30_000, device, seed=0)
    batch.pop("attention_mask")

    def step() -> float:
        started = time.perf_counter()
        nn.functional.cross_entropy(classifier(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    for _ in range(5):
        step()
    return step


def measure_joined(precision: Precision, counts: Sequence[int] = (2, 4, 8)) -> dict[str, float]:
    """The time of R steps of 32 examples to that of one step of 32 R, medians of interleaved steps, by R.

    A bound on what R runs gain whose frozen products are made on their joined tokens: each run's adapters, dropout,
    head and optimizer would still be its own.
    """
    steps = {count: make_step(precision, compiled=True, batch_size=count * BATCH_SIZE) for count in (1, *counts)}
    seconds: dict[int, list[float]] = {count: [] for count in steps}
    for _ in range(STEPS):
        for count, step in steps.items():
            seconds[count].append(step())
    medians = {count: float(np.median(found)) for count, found in seconds.items()}
    return {str(count): count * medians[1] / medians[count] for count in counts}


def profile_step(precision: Precision = "fp32", *, compiled: bool = False) -> dict[str, Any]:
    """Milliseconds of a LoRA step of 32 examples of 13 tokens, and of its operations by kind of work, from 30 steps.

    Timing every operation takes time itself: the kinds add up to a little more than the step.
    """
    step = make_step(precision, compiled=compiled)
    whole = float(np.median([step() for _ in range(STEPS)]))
    timer = Timer()
    with timer, timer.kernels():
        for _ in range(STEPS):
            step()
    kinds = {kind: 1e3 * seconds / STEPS for kind, seconds in timer.seconds.items()}
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    name = f"{precision}, {'compiled kernels' if compiled else 'torch operations'}"
    return {"name": name, "milliseconds": 1e3 * whole, "operations": timer.calls // STEPS, "kinds": ordered}
