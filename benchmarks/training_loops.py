"""The loops that ``benchmarks.training`` compares. Each takes the same examples and calls its gate after every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.common import MODELS, TARGET_MODULES, make_lora_method
from benchmarks.stepping import Gate
from benchmarks.trainers import make_trainer
from fwlora import AdaLoraCallback, FisherWeightedLora, FisherWeighting
from fwlora.adalora import AdaLora, attach_adalora, plan_adalora
from fwlora.architectures import find_target_matrices
from fwlora.experiment.data.batching import Padding, TokenizedSplit, plan_epoch, stage
from fwlora.experiment.engine.device import keep_freed_memory
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions, Precision, TrainingOptions
from fwlora.experiment.engine.precision import DTYPES
from fwlora.experiment.engine.task import Task
from fwlora.experiment.fused.compiled import load_kernels
from fwlora.experiment.fused.forward import PlainClassifier
from fwlora.experiment.methods import Method
from fwlora.experiment.methods.adalora import AdaLoraMethod
from fwlora.experiment.methods.fw_lora import FwLoraMethod

NEVER = 10**9
EPOCHS = 10**4
SEED = 0
# FW-LoRA held in one phase; the others train as they are.
FISHER = {
    "fw_lora measuring": FisherWeighting(warmup_steps=NEVER, fisher_every=1),
    "fw_lora between": FisherWeighting(warmup_steps=NEVER, fisher_every=NEVER),
    "fw_lora shrinking": FisherWeighting(warmup_steps=1, fisher_every=1),
}


class Gated:
    """A method that reports the end of every step."""

    def __init__(self, method: Method, gate: Gate) -> None:
        self._method, self._gate = method, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def after_step(self, step: int) -> None:
        self._method.after_step(step)
        self._gate.step_done()


class GatedCallback(TrainerCallback):
    """The same for the Trainer."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gate.step_done()


def load(options: dict[str, Any]) -> tuple[TokenizedSplit, TokenizedSplit, Task, TrainingOptions, torch.device]:
    """The examples and what all loops are told; ``threads`` of the process are set here.

    With ``mean_length`` the examples are random tokens, and nothing of GLUE is read.
    """
    if "threads" in options:
        torch.set_num_threads(options["threads"])
    if "mean_length" in options:
        train_split, eval_split = (random_split(n, options["mean_length"]) for n in (options["examples"], 64))
        pad_token_id = 1
    else:
        from benchmarks.glue_data import task_splits

        train_split, eval_split, pad_token_id = task_splits(options["glue"], "sst2", options["examples"])
    settings = TrainingOptions(
        epochs=EPOCHS, batch_size=options["batch_size"], learning_rate=1e-4, weight_decay=0.1, warmup_ratio=0.06,
        seed=SEED,
    )  # fmt: skip
    return train_split, eval_split, Task(pad_token_id, 2, "accuracy"), settings, torch.device(options["device"])


def random_split(examples: int, mean_length: int) -> TokenizedSplit:
    """Random tokens in examples of half to one and a half times the mean length."""
    generator = np.random.default_rng(SEED)
    lengths = generator.integers(mean_length // 2, mean_length * 3 // 2 + 1, examples)
    tokens = generator.integers(1_000, 20_000, lengths.sum()).astype(np.int32)
    return TokenizedSplit(tokens, None, np.concatenate([[0], np.cumsum(lengths)]), generator.integers(0, 2, examples))


def make_method(options: dict[str, Any], device: torch.device) -> tuple[nn.Module, Method]:
    """The adapted model and its method, by ``options["method"]``."""
    name = options["method"]
    if name == "adalora":
        base = MODELS[options["model"]]()
        matrices = find_target_matrices(base, TARGET_MODULES)
        rank = options["rank"]
        total_steps = EPOCHS * math.ceil(options["examples"] / options["batch_size"])
        plan = plan_adalora(matrices, rank * sum(matrix.cost for matrix in matrices), float(rank), 1.5)
        schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
        adapted = attach_adalora(
            base, matrices, plan, scaling=2.0, dropout=0.1, total_steps=total_steps, schedule=schedule,
            head_modules=["classifier"], task_type="SEQ_CLS",
        ).to(device)  # fmt: skip
        return adapted, AdaLoraMethod(AdaLora(adapted, plan))
    model, method = make_lora_method(options["model"], options["rank"], device, SEED)
    if name in FISHER:
        return model, FwLoraMethod(FisherWeightedLora(model, FISHER[name]))
    return model, method


def engine_loop(gate: Gate, options: dict[str, Any]) -> None:
    """This engine.

    ``compiled`` false leaves the layers to torch's operations, ``torch_compile`` the model to ``torch.compile``.
    """
    keep_freed_memory()
    train_split, eval_split, task, settings, device = load(options)
    model, method = make_method(options, device)
    precision: Precision = options["precision"]
    engine = EngineOptions(
        Processes(device),
        precision,
        fused=not options.get("torch_compile", False),
        cuda_graphs=options.get("cuda_graphs", False),
        kernels=load_kernels(DTYPES[precision]) if device.type == "cpu" and options.get("compiled", True) else None,
    )
    if not engine.fused:
        inner: Any = model.get_base_model()  # type: ignore[operator]
        inner.forward = torch.compile(inner.forward, dynamic=True)
    train(
        model, cast(Method, Gated(method, gate)), train_split, eval_split.select(np.arange(64)), settings, task, engine,
        log=lambda row: None,
    )  # fmt: skip


def trainer_loop(gate: Gate, options: dict[str, Any]) -> None:
    """transformers' Trainer with PEFT; clips gradients, as it does by itself."""
    train_split, _, task, settings, device = load(options)
    model, _ = make_method(options, device)
    callbacks: list[TrainerCallback] = [GatedCallback(gate)]
    if options["method"] == "adalora":
        callbacks.insert(0, AdaLoraCallback())
    settings = replace(settings, max_gradient_norm=1.0)
    make_trainer(
        model, train_split, task.pad_token_id, settings, precision=options["precision"], grouped=options["grouped"],
        callbacks=callbacks, device=device,
    ).train()  # fmt: skip


def epoch_batches(split: TokenizedSplit, task: Task, settings: TrainingOptions, device: torch.device) -> Iterator[Any]:
    """Batches of like length, epoch after epoch, for a model that computes padding."""
    for epoch in range(EPOCHS):
        plan = plan_epoch(split.lengths, settings.batch_size, seed=SEED, epoch=epoch, by_length=True)
        yield from stage(split, plan, Padding(task.pad_token_id), device)


def backbone_loop(gate: Gate, options: dict[str, Any]) -> None:
    """The model without adapters and without dropout, gradients down to the embeddings, on the engine's batches."""
    keep_freed_memory()
    train_split, _, task, settings, device = load(options)
    model: Any = MODELS[options["model"]]().to(device).requires_grad_(False).train()
    model.classifier.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    classifier = PlainClassifier(model, options["precision"])
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-4, fused=True)
    for batch in epoch_batches(train_split, task, settings, device):
        nn.functional.cross_entropy(classifier(**batch.inputs()), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        gate.step_done()


def limit_loop(gate: Gate, options: dict[str, Any]) -> None:
    """The layers' matrix products alone, X W^T and G W for each, on the real tokens of the engine's own batches.

    Every product reads an X or G of its own layer's, as in a network: query, key and value share their X.
    """
    keep_freed_memory()
    train_split, _, _, settings, device = load(options)
    model: Any = MODELS[options["model"]]().to(device)
    dtype = torch.bfloat16 if options["precision"] == "bf16" else torch.float32
    layers = getattr(model, model.base_model_prefix).encoder.layer
    weights = [
        [module.weight.detach().to(dtype) for module in layer.modules() if isinstance(module, nn.Linear)]
        for layer in layers
    ]
    most = settings.batch_size * int(train_split.lengths.max())
    inputs = [[torch.randn(most, weight.shape[1], device=device, dtype=dtype) for weight in row[2:]] for row in weights]
    outputs = [[torch.randn(most, weight.shape[0], device=device, dtype=dtype) for weight in row] for row in weights]

    places = [(layer, place) for layer, row in enumerate(weights) for place in range(len(row))]
    orders = (
        plan_epoch(train_split.lengths, settings.batch_size, seed=SEED, epoch=n, by_length=False) for n in range(EPOCHS)
    )
    for batch in (batch for order in orders for batch in order):
        tokens = int(train_split.lengths[batch].sum())
        for layer, place in places:
            torch.mm(inputs[layer][max(0, place - 2)][:tokens], weights[layer][place].T)
        for layer, place in reversed(places):
            torch.mm(outputs[layer][place][:tokens], weights[layer][place])
        gate.step_done()
