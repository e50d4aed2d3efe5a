"""What FW-LoRA costs: time per step and peak memory against plain PEFT LoRA, all variants interleaved in one run.

    uv run python -m benchmarks.overhead [--json PATH] [--rounds 200] [--model minilm|roberta-base] [--device cpu|cuda]

Every round takes one training step (forward, backward, the method, AdamW) of every variant on the same batch, in a
random order; the ratio to plain LoRA's step is formed within the round. `lora again` is plain LoRA against itself: what
the measurement can resolve. Leave the machine idle.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    MODELS,
    TARGET_MODULES,
    Interval,
    make_lora,
    median_interval,
    mixture_interval,
    print_table,
    show_progress,
    write_json,
)
from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adalora import AdaLora, attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs
from fwlora.architectures import find_target_matrices

# Token counts of batches of like length on SST-2 (mean 13 with the special tokens, long tail).
BATCH_LENGTHS = (5, 6, 8, 9, 11, 13, 16, 21, 29)
SCHEDULE = {"warmup_steps": 500, "total_steps": 6_315}  # SST-2, three epochs of 67,349 examples in batches of 32
FISHER_EVERY = FisherWeighting().fisher_every
NEVER = 10**9
SETTLING_ROUNDS = 5
TARGETS = {"warm-up step": 1.02, "shrinkage step": 1.008, "whole run": 1.01, "peak memory": 1.01}


@dataclass
class Variant:
    """One way to train: its model, what it adds to the loss and what it does after ``backward()`` and ``step()``."""

    model: nn.Module
    term: Callable[[], Tensor | None] = lambda: None
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda)
        self.model.train()

    def step(self, batch: Mapping[str, Tensor], labels: Tensor) -> None:
        loss = nn.functional.cross_entropy(self.model(**batch).logits, labels)
        term = self.term()
        (loss if term is None else loss + term).backward()
        self.after_backward()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad(set_to_none=True)


def make_fisher_weighted(model: nn.Module, *, shrinking: bool = False, **options: Any) -> Variant:
    """FW-LoRA held in one phase: measuring at every step, never, or shrinking."""
    fisher_weighted = FisherWeightedLora(model, FisherWeighting(warmup_steps=1 if shrinking else NEVER, **options))
    variant = Variant(model)
    variant.after_backward = lambda: fisher_weighted.step(variant.optimizer)
    return variant


def make_naive(model: nn.Module, *, shrinking: bool) -> Variant:
    """The obvious implementation: gradients for all base parameters, norms read one by one, the penalty from dW."""
    pairs = find_adapter_pairs(model)
    layers: list[Any] = [pair.module for pair in pairs]
    weights = [layer.base_layer.weight for layer in layers]
    fisher = [1.0 / len(pairs)] * len(pairs)

    def penalty() -> Tensor:
        terms = [
            (1 - share) * (pair.scaling * pair.B @ pair.A).square().sum()
            for share, pair in zip(fisher, pairs, strict=True)
        ]
        return 1e-4 * torch.stack(terms).sum()

    def measure() -> None:
        for index, weight in enumerate(weights):
            fisher[index] = 0.98 * fisher[index] + 0.02 * weight.grad.square().sum().item()
        for parameter in frozen:
            parameter.grad = None

    if shrinking:
        return Variant(model, term=penalty)
    variant = Variant(model, after_backward=measure)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return variant


def make_adalora(load: Callable[[], nn.Module], rank: int, device: torch.device) -> Variant:
    """AdaLoRA at the same parameter budget, in its pruning phase, by PEFT's own per-step work."""
    model = load()
    matrices = find_target_matrices(model, TARGET_MODULES)
    budget = rank * sum(matrix.cost for matrix in matrices)
    plan = plan_adalora(matrices, budget, float(rank), init_rank_factor=1.5)
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
    adapted = attach_adalora(
        model, matrices, plan, scaling=2.0, dropout=0.1, total_steps=NEVER, schedule=schedule,
        head_modules=["classifier"], task_type="SEQ_CLS",
    ).to(device)  # fmt: skip
    method = AdaLora(adapted, plan)
    steps = iter(range(1, NEVER))
    return Variant(adapted, term=method.loss_term, after_step=lambda: method.after_step(next(steps)))


def make_variants(load: Callable[[], nn.Module], rank: int, device: torch.device) -> dict[str, Callable[[], Variant]]:
    """Constructors by name; the first is what the others are compared with."""

    def lora() -> nn.Module:
        return make_lora(load, rank, device)

    return {
        "lora": lambda: Variant(lora()),
        "lora again": lambda: Variant(lora()),
        "exact, measured step": lambda: make_fisher_weighted(lora(), estimator="exact", fisher_every=1),
        "sketch, measured step": lambda: make_fisher_weighted(lora(), estimator="sketch", fisher_every=1),
        "adapter, measured step": lambda: make_fisher_weighted(lora(), estimator="adapter", fisher_every=1),
        "unmeasured step": lambda: make_fisher_weighted(lora(), estimator="sketch", fisher_every=NEVER),
        "shrinkage step": lambda: make_fisher_weighted(lora(), shrinking=True),
        "adalora": lambda: make_adalora(load, rank, device),
        "naive, warm-up step": lambda: make_naive(lora(), shrinking=False),
        "naive, shrinkage step": lambda: make_naive(lora(), shrinking=True),
    }


def draw_batch(
    length: int, batch_size: int, vocabulary: int, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Random tokens: the time of a step does not depend on which they are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, vocabulary, (batch_size, length), generator=generator)
    labels = torch.randint(0, 2, (batch_size,), generator=generator)
    return {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}, labels.to(device)


def time_rounds(
    variants: dict[str, Variant], rounds: int, batch_size: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds per step by variant, shape (rounds,), a round's steps on one batch and in random order."""
    model: Any = next(iter(variants.values())).model
    vocabulary = model.config.vocab_size
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in show_progress(
        range(-SETTLING_ROUNDS, rounds), description=f"{rounds} rounds of {len(variants)} steps"
    ):
        length = BATCH_LENGTHS[number % len(BATCH_LENGTHS)]
        batch, labels = draw_batch(length, batch_size, vocabulary, device, seed=number + SETTLING_ROUNDS)
        for name in order.permutation(list(variants)):
            _synchronize(device)
            started = time.perf_counter()
            variants[name].step(batch, labels)
            _synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def measure_peak_bytes(variant: Variant, batch_size: int, device: torch.device) -> int:
    """Most tensor memory at any moment of the second step, the longest batch: parameters, state, activations."""
    config: Any = variant.model.config
    batch, labels = draw_batch(max(BATCH_LENGTHS), batch_size, config.vocab_size, device, seed=0)
    variant.step(batch, labels)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        variant.step(batch, labels)
        return torch.cuda.max_memory_allocated(device)
    # Nothing else is alive: parameters, optimizer state, and whatever a method keeps.
    tensors = [held for held in gc.get_objects() if type(held) in (Tensor, nn.Parameter)]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        variant.step(batch, labels)
    current = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return held + most


def summarize(seconds: dict[str, np.ndarray]) -> dict[str, Interval]:
    """Ratios to plain LoRA: per kind of step, and for the warm-up and the whole run that they make up."""
    ratios = {name: values / seconds["lora"] for name, values in seconds.items()}
    found = {name: median_interval(values) for name, values in ratios.items() if name != "lora"}
    # Medians of kinds of step are mixed: the median over a warm-up's mixed steps would hide the rarer kind.
    warm, total = SCHEDULE["warmup_steps"], SCHEDULE["total_steps"]
    for estimator in ("exact", "sketch", "adapter"):
        measured, idle = ratios[f"{estimator}, measured step"], ratios["unmeasured step"]
        parts = [(1 / FISHER_EVERY, measured), (1 - 1 / FISHER_EVERY, idle)]
        found[f"{estimator}, warm-up step (1 of {FISHER_EVERY} measured)"] = mixture_interval(parts)
        run = [(weight * warm / total, values) for weight, values in parts]
        run.append(((total - warm) / total, ratios["shrinkage step"]))
        found[f"{estimator}, whole run ({warm} of {total:,} steps)"] = mixture_interval(run)
    naive = [
        (warm / total, ratios["naive, warm-up step"]),
        ((total - warm) / total, ratios["naive, shrinkage step"]),
    ]
    found[f"naive, whole run ({warm} of {total:,} steps)"] = mixture_interval(naive)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=sorted(MODELS), help="default: minilm on a CPU, roberta-base on a GPU")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    model_name = arguments.model or ("roberta-base" if on_gpu else "minilm")
    constructors = make_variants(MODELS[model_name], arguments.rank, device)

    memory = {}
    for name, make in constructors.items():
        memory[name] = measure_peak_bytes(make(), arguments.batch_size, device)
        gc.collect()
    seconds = time_rounds(
        {name: make() for name, make in constructors.items()}, arguments.rounds, arguments.batch_size, device
    )
    found = summarize(seconds)
    rows = [
        ["lora", f"{1e3 * np.median(seconds['lora']):.1f}", "1", f"{memory['lora'] / 2**20:.1f}", "1"],
        *(
            [
                name,
                f"{1e3 * np.median(seconds[name]):.1f}" if name in seconds else "",
                str(interval),
                f"{memory[name] / 2**20:.1f}" if name in memory else "",
                f"{memory[name] / memory['lora']:.4f}" if name in memory else "",
            ]
            for name, interval in found.items()
        ),
    ]  # fmt: skip
    print_table(
        f"{model_name}, batch {arguments.batch_size}, rank {arguments.rank}, {arguments.rounds} pairs",
        ["variant", "ms / step", "time / LoRA [95 %]", "peak MiB", "peak / LoRA"],
        rows,
    )
    print(f"targets: {', '.join(f'{name} <= {value}' for name, value in TARGETS.items())}")
    if arguments.json:
        settings = {
            "model": model_name, "batch_size": arguments.batch_size, "rank": arguments.rank, "rounds": arguments.rounds,
            "batch_lengths": BATCH_LENGTHS, "fisher_every": FISHER_EVERY, "schedule": SCHEDULE, "targets": TARGETS,
        }  # fmt: skip
        results = {
            "time_ratios": {name: vars(interval) for name, interval in found.items()},
            "median_step_ms": {name: 1e3 * float(np.median(values)) for name, values in seconds.items()},
            "quartiles_step_ms": {
                name: [1e3 * float(q) for q in np.percentile(values, [25, 75])] for name, values in seconds.items()
            },
            "peak_bytes": memory,
            "ratios": {
                name: [round(float(r), 5) for r in values / seconds["lora"]] for name, values in seconds.items()
            },
        }
        write_json(arguments.json, device, settings, results)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
