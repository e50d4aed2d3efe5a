"""The training loop. It knows batches, a model and a method; it knows neither Hydra nor W&B."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from fwlora.experiment import metrics
from fwlora.experiment.batching import TokenizedSplit, collate, plan_epoch, plan_evaluation
from fwlora.experiment.errors import UserError
from fwlora.experiment.progress import Progress
from fwlora.experiment.settings import TrainingSettings
from fwlora.methods import Method
from fwlora.regularizer import UnmeasuredError

DIVERGENCE_REMEDY = "lower run.training.learning_rate, or set run.training.max_gradient_norm=1.0"


class DivergedError(UserError):
    """The loss is no longer finite."""


# Step values are read from the device this many steps at a time: a read makes the host wait for the device.
STEPS_PER_FLUSH = 20
EVALUATION_BATCH_FACTOR = 2


@dataclass(frozen=True)
class Task:
    """What the engine has to know of a task.

    Attributes:
        pad_token_id: of the tokenizer.
        num_classes: classes.
        task_metric: the metric that is compared, one of :data:`fwlora.experiment.metrics.TASK_METRICS`.
        pad_left: whether the model wants its padding before the tokens.
    """

    pad_token_id: int
    num_classes: int
    task_metric: str
    pad_left: bool = False


@dataclass(frozen=True)
class Execution:
    """Where and how to compute.

    Attributes:
        device: where the model is.
        precision: ``bf16`` autocasts, ``fp32`` does not.
        fixed_width: pad every batch to this many tokens and draw batches at random; None pads to the longest example of
            a batch, and batches hold examples of like length.
    """

    device: torch.device
    precision: str = "fp32"
    fixed_width: int | None = None


@dataclass
class Evaluation:
    """One pass over a split: mean cross-entropy, task metrics, and predicted classes in data-set order."""

    loss: float
    values: dict[str, float]
    predictions: np.ndarray


@dataclass
class TrainingResult:
    """What a training run came to.

    Attributes:
        last: evaluation after the last epoch; the only one that is compared.
        epochs: the per-epoch history rows.
        times_s: seconds by phase: ``warmup``, ``train`` (steps after the warm-up) and ``eval``.
        step_times_s: wall-clock seconds of each optimiser step, as means over the steps between two reads of the
            device: on a GPU single steps return before they are done.
        total_steps: optimiser steps taken.
        peak_memory_mib: allocated on the GPU during this training; elsewhere of the whole process, a search included.
    """

    last: Evaluation
    epochs: list[dict[str, float]] = field(default_factory=list)
    times_s: dict[str, float] = field(default_factory=dict)
    step_times_s: list[float] = field(default_factory=list)
    total_steps: int = 0
    peak_memory_mib: float = 0.0


def train(
    model: nn.Module,
    method: Method,
    train_split: TokenizedSplit,
    eval_split: TokenizedSplit,
    training: TrainingSettings,
    task: Task,
    execution: Execution,
    *,
    log: Callable[[Mapping[str, float]], None],
    report: Callable[[Progress], None] = lambda progress: None,
) -> TrainingResult:
    """Trains for ``training.epochs`` and evaluates after each.

    The loss of a step is the mean cross-entropy over its examples, whatever the number of micro-batches, computed from
    logits; a method's own term is added once per step and never enters an evaluation.

    Args:
        log: takes one history row, by the names of :mod:`fwlora.experiment.metrics`.
        report: takes progress, after every flush of step values.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    total_steps = training.total_steps(len(train_split))
    optimizer, scheduler = _make_optimizer(model, training, total_steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clock = _PhaseClock(execution.device)
    torch.manual_seed(training.seed)
    if execution.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(execution.device)
    step, epoch_rows, step_times = 0, [], []
    evaluation = None
    for epoch in range(training.epochs):
        model.train()
        meter = _EpochMeter(log, report, total_steps, training.steps_per_epoch(len(train_split)))
        for micro_batches in _epoch_steps(train_split, training, execution, epoch):
            step += 1
            with clock.phase("warmup" if method.in_warmup else "train"):
                warming_up = method.in_warmup
                loss, correct = _forward_backward(model, method, train_split, micro_batches, task, execution)
                try:
                    method.after_backward(optimizer)
                except UnmeasuredError as error:
                    raise DivergedError(f"step {step}: {error}; {DIVERGENCE_REMEDY}") from None
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                if training.max_gradient_norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, training.max_gradient_norm, norm)
                learning_rate = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                method.after_step(step)
                optimizer.zero_grad(set_to_none=True)
                values = {
                    metrics.TRAIN_LOSS: loss,
                    metrics.GRADIENT_NORM: norm,
                    **method.step_values(),
                    metrics.GLOBAL_STEP: step,
                    metrics.LEARNING_RATE: learning_rate,
                    metrics.FISHER_WARMUP: float(warming_up),
                }
                meter.add(values, correct, sum(len(batch) for batch in micro_batches))
        with clock.phase("warmup" if method.in_warmup else "train"):
            meter.flush()
        step_times += meter.step_times_s
        with clock.phase("eval"):
            evaluation = evaluate(model, eval_split, training.batch_size, task, execution)
        row = {metrics.GLOBAL_STEP: step, metrics.EPOCH: epoch + 1, **meter.epoch_values(), **evaluation.values}
        log(row)
        epoch_rows.append(row)
    assert evaluation is not None
    return TrainingResult(evaluation, epoch_rows, clock.seconds, step_times, step, peak_memory_mib(execution.device))


@torch.no_grad()
def evaluate(model: nn.Module, split: TokenizedSplit, batch_size: int, task: Task, execution: Execution) -> Evaluation:
    """Cross-entropy, task metrics and predictions of a split, each example counted once; no penalty enters.

    Raises:
        DivergedError: the cross-entropy is not finite.
    """
    model.eval()
    predictions = np.zeros(len(split), dtype=np.int64)
    total = 0.0
    for batch in plan_evaluation(split.lengths, EVALUATION_BATCH_FACTOR * batch_size):
        logits, labels = _forward(model, split, batch, task, execution)
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        predictions[batch] = logits.argmax(dim=-1).cpu().numpy()
    if not np.isfinite(total):
        raise DivergedError(f"the evaluation loss is {total / len(split)}; {DIVERGENCE_REMEDY}")
    values = metrics.compute_task_metrics(split.labels, predictions, task.num_classes)
    named = {metrics.EVAL_LOSS: total / len(split), **{metrics.eval_name(k): v for k, v in values.items()}}
    return Evaluation(named[metrics.EVAL_LOSS], named, predictions)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory in use so far, in MiB: allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = psutil.Process().memory_info()
    if hasattr(usage, "peak_wset"):
        return usage.peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if psutil.MACOS else 2**10)


def choose_device(wanted: str) -> torch.device:
    """The device that ``engine.device`` names.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device is cuda, but torch sees no GPU; use engine.device=cpu or auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str | None]:
    """The precision to compute in, and a line to say where it is not the one wanted.

    bf16 is used where the hardware multiplies it natively: emulated, a product can be hundreds of times slower.
    """
    if wanted != "bf16":
        return "fp32", None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    if native:
        return "bf16", None
    return "fp32", f"this {device.type} has no fast bf16: computing in float32"


def _make_optimizer(model: nn.Module, training: TrainingSettings, total_steps: int) -> tuple[Any, Any]:
    """AdamW without decay on biases and normalisation, as transformers' Trainer does it, and the named schedule."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": training.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for _, p in trainable)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate, fused=fused)
    warmup = int(np.ceil(training.warmup_ratio * total_steps))
    return optimizer, get_scheduler(training.lr_scheduler, optimizer, warmup, total_steps)


def _epoch_steps(
    split: TokenizedSplit, training: TrainingSettings, execution: Execution, epoch: int
) -> Iterator[list[np.ndarray]]:
    """The epoch's optimiser steps, each a list of micro-batches."""
    by_length = execution.fixed_width is None
    batches = plan_epoch(split.lengths, training.batch_size, seed=training.seed, epoch=epoch, by_length=by_length)
    for start in range(0, len(batches), training.gradient_accumulation_steps):
        yield batches[start : start + training.gradient_accumulation_steps]


def _forward(
    model: nn.Module, split: TokenizedSplit, batch: np.ndarray, task: Task, execution: Execution
) -> tuple[Tensor, Tensor]:
    """Float32 logits (batch, classes) and labels (batch,)."""
    inputs, labels = collate(
        split, batch, pad_token_id=task.pad_token_id, width=execution.fixed_width, pad_left=task.pad_left
    )
    inputs = {name: value.to(execution.device, non_blocking=True) for name, value in inputs.items()}
    with torch.autocast(execution.device.type, torch.bfloat16, enabled=execution.precision == "bf16"):
        logits = model(**inputs).logits
    return logits.float(), labels.to(execution.device, non_blocking=True)


def _forward_backward(
    model: nn.Module,
    method: Method,
    split: TokenizedSplit,
    micro_batches: list[np.ndarray],
    task: Task,
    execution: Execution,
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradient of the step's mean loss; returns that mean and the number of correct predictions."""
    examples = sum(len(batch) for batch in micro_batches)
    loss_sum: Tensor | float = 0.0
    correct: Tensor | int = 0
    for place, batch in enumerate(micro_batches):
        logits, labels = _forward(model, split, batch, task, execution)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / examples
        loss_sum = loss_sum + loss.detach()
        correct = correct + (logits.detach().argmax(dim=-1) == labels).sum()
        term = method.regularisation() if place == len(micro_batches) - 1 else None
        (loss if term is None else loss + term).backward()
    return torch.as_tensor(loss_sum), torch.as_tensor(correct)


class _PhaseClock:
    """Wall-clock seconds by phase. On a GPU it waits for the device only where the phase changes."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {"warmup": 0.0, "train": 0.0, "eval": 0.0}
        self._device = device
        self._current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name != self._current:
            self._settle()
        self._current = name
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started
        if name == "eval":
            self._settle()

    def _settle(self) -> None:
        """Waits for the device, on the account of the phase that gave it the work."""
        if self._device.type == "cuda" and self._current is not None:
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)
            self.seconds[self._current] += time.perf_counter() - started


class _EpochMeter:
    """Collects step values on the device and logs them a flush at a time."""

    def __init__(
        self,
        log: Callable[[Mapping[str, float]], None],
        report: Callable[[Progress], None],
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self._log, self._report = log, report
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._pending: list[tuple[dict[str, Any], Tensor, int]] = []
        self._loss_sum = self._correct = 0.0
        self._examples = 0
        self._last_flush = time.perf_counter()
        self.step_times_s: list[float] = []

    def add(self, values: dict[str, Any], correct: Tensor, examples: int) -> None:
        self._pending.append((values, correct, examples))
        if len(self._pending) == STEPS_PER_FLUSH:
            self.flush()

    def flush(self) -> None:
        """Reads all pending tensors in one transfer and logs a row per step.

        Raises:
            DivergedError: a loss that is not finite.
        """
        if not self._pending:
            return
        tensors = [v for values, correct, _ in self._pending for v in (*values.values(), correct) if torch.is_tensor(v)]
        numbers = iter(torch.stack([t.detach().double().reshape(()).to(tensors[0].device) for t in tensors]).tolist())
        now = time.perf_counter()
        self.step_times_s += [(now - self._last_flush) / len(self._pending)] * len(self._pending)
        self._last_flush = now
        row: dict[str, float] = {}
        for values, _, examples in self._pending:
            row = {name: next(numbers) if torch.is_tensor(value) else value for name, value in values.items()}
            self._correct += next(numbers)
            row[metrics.EPOCH] = row[metrics.GLOBAL_STEP] / self._steps_per_epoch
            self._loss_sum += row[metrics.TRAIN_LOSS] * examples
            self._examples += examples
            self._log(row)
            if not np.isfinite(row[metrics.TRAIN_LOSS]):
                where = f"at step {row[metrics.GLOBAL_STEP]:.0f}"
                raise DivergedError(f"the training loss is {row[metrics.TRAIN_LOSS]} {where}; {DIVERGENCE_REMEDY}")
        step = int(row[metrics.GLOBAL_STEP])
        epoch = (step - 1) // self._steps_per_epoch + 1
        warming_up = bool(row[metrics.FISHER_WARMUP])
        self._report(Progress(step, self._total_steps, epoch, row[metrics.TRAIN_LOSS], warming_up))
        self._pending.clear()

    def epoch_values(self) -> dict[str, float]:
        """Mean loss and accuracy over the epoch's training examples."""
        return {
            metrics.TRAIN_EPOCH_LOSS: self._loss_sum / self._examples,
            metrics.TRAIN_EPOCH_ACCURACY: self._correct / self._examples,
        }
