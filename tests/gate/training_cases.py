"""Short trainings of a tiny encoder in float64: one per method, importance and estimator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from fwlora import FisherWeightedLora, FisherWeighting, plan_ranks
from fwlora.adalora import AdaLora, attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs
from fwlora.config import attach_lora
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions, TrainingOptions
from fwlora.experiment.engine.task import Task
from fwlora.experiment.methods import Method
from fwlora.experiment.methods.adalora import AdaLoraMethod
from fwlora.experiment.methods.fw_lora import FwLoraMethod
from fwlora.experiment.methods.lora import LoraMethod

STEPS = 30
BATCH_SIZE = 4
VOCABULARY = 61
BUDGET_PERCENT = 4.0
ADALORA_SCHEDULE = {"tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
IMPORTANCES = ("sum", "max", "mean", "none")
ESTIMATORS = ("exact", "sketch", "adapter")
LOGGED = ("train_loss", "gradient_norm", "penalty", "learning_rate")


def run_cases() -> dict[str, dict[str, Any]]:
    """Run every case on one thread.

    Returns:
        Case name -> logged sequences of :data:`STEPS` values, and the values of the last evaluation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _run_case(**case) for name, case in list_cases()}
    finally:
        torch.set_num_threads(threads)


def list_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and arguments of every case."""
    yield "lora", {"method": "lora"}
    yield "lora, the model's own forward", {"method": "lora", "fast": False}
    yield "adalora", {"method": "adalora"}
    yield "head alone", {"method": "head"}
    for importance in IMPORTANCES:
        for estimator in ESTIMATORS:
            options = {"importance": importance, "estimator": estimator}
            yield f"fw_lora, {importance}, {estimator}", {"method": "fw_lora", "options": options}
    yield "fw_lora, reallocate", {"method": "fw_lora", "options": {"allocation": "reallocate"}}
    own_forward = {"method": "fw_lora", "options": {"fisher_every": 1}, "fast": False}
    yield "fw_lora, the model's own forward", own_forward


def _run_case(method: str, options: dict[str, Any] | None = None, fast: bool = True) -> dict[str, Any]:
    model, attached = attach_method(method, options or {})
    rows: list[dict[str, Any]] = []
    task = Task(pad_token_id=1, num_classes=2, task_metric="accuracy")
    engine = EngineOptions(Processes(torch.device("cpu")), "fp32", None if fast else 16, fast, fast)
    result = train(
        model, attached, make_split(STEPS * BATCH_SIZE // 2, 0), make_split(24, 1), make_options(), task, engine,
        log=lambda row: rows.append(dict(row)),
    )  # fmt: skip
    steps = [row for row in rows if "train_loss" in row]
    sequences: dict[str, Any] = {name: [float(row[name]) for row in steps] for name in LOGGED}
    return {**sequences, "evaluation": {name: float(value) for name, value in sorted(result.last.values.items())}}


def make_options() -> TrainingOptions:
    return TrainingOptions(
        epochs=2, batch_size=BATCH_SIZE, learning_rate=0.01, weight_decay=0.01, warmup_ratio=0.1, max_gradient_norm=1.0,
        seed=7,
    )  # fmt: skip


def _make_model(num_labels: int) -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, type_vocab_size=1, pad_token_id=1, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    config.num_labels = num_labels
    return RobertaForSequenceClassification(config)


def attach_method(method: str, options: dict[str, Any], num_labels: int = 2) -> tuple[Any, Method]:
    # Attached in float32 and converted as a whole: PEFT makes AdaLoRA's rank buffers trainable in a float64 model.
    model = _make_model(num_labels)
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model.double(), LoraMethod([])
    plan = plan_ranks(model, BUDGET_PERCENT)
    shared: dict[str, Any] = {"scaling": 2.0, "dropout": 0.1, "head_modules": ["classifier"], "task_type": "SEQ_CLS"}
    torch.manual_seed(1)
    if method == "adalora":
        adalora_plan = plan_adalora(plan.matrices, plan.budget, plan.mean_rank, 1.5)
        adapted = attach_adalora(
            model, plan.matrices, adalora_plan, total_steps=STEPS, schedule=ADALORA_SCHEDULE, **shared
        ).double()
        return adapted, AdaLoraMethod(AdaLora(adapted, adalora_plan))
    adapted = attach_lora(model, plan.ranks, **shared).double()
    if method == "lora":
        return adapted, LoraMethod(find_adapter_pairs(adapted))
    # A strength that shows in the gradient norms of so few steps; every estimator measures 8 steps.
    weighting = FisherWeighting(**{"strength": 0.05, "warmup_steps": 8, "fisher_every": 2, "sketch_size": 4, **options})
    return adapted, FwLoraMethod(FisherWeightedLora(adapted, weighting))


def make_split(count: int, seed: int) -> TokenizedSplit:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 13, size=count)
    tokens = generator.integers(5, VOCABULARY, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[:-1]] = 0
    labels = (tokens[offsets[:-1] + 1] % 2).astype(np.int64)
    return TokenizedSplit(tokens, None, offsets, labels)
