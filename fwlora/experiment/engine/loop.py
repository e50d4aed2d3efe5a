"""The training loop. It knows batches, a model and a method; it knows neither Hydra nor W&B."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from fwlora.experiment.data.batching import Batch, Padding, TokenizedSplit, plan_epoch, plan_evaluation, stage
from fwlora.experiment.engine.cuda_graphs import GraphedPasses
from fwlora.experiment.engine.device import peak_memory_mib
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.meters import DIVERGENCE_REMEDY, DivergedError, EpochMeter, PhaseClock
from fwlora.experiment.errors import UserError
from fwlora.experiment.fused.forward import FastClassifier, make_classifier
from fwlora.experiment.methods import Method
from fwlora.experiment.settings.schema import TrainingSettings
from fwlora.experiment.study.progress import Progress
from fwlora.experiment.tracking import metrics
from fwlora.regularizer import UnmeasuredError

logger = logging.getLogger(__name__)

EVALUATION_BATCH_FACTOR = 2
# Widths on a GPU: few shapes, each a multiple of what its matrix units take at once.
GPU_WIDTH_MULTIPLE = 8
# More than the seeds of any study span.
SEEDS_BETWEEN_PROCESSES = 2**33
# What torch's cross-entropy passes over.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Task:
    """What the engine has to know of a task.

    Attributes:
        pad_token_id: of the tokenizer.
        num_classes: classes.
        task_metric: the metric that is compared, one of :data:`fwlora.experiment.tracking.metrics.TASK_METRICS`.
        pad_left: whether the model wants its padding before the tokens.
        max_length: tokens that the model takes at most; None where there is no limit.
    """

    pad_token_id: int
    num_classes: int
    task_metric: str
    pad_left: bool = False
    max_length: int | None = None


@dataclass(frozen=True)
class Execution:
    """Where and how to compute.

    Attributes:
        device: where the model is.
        precision: ``bf16`` or ``fp32``.
        fixed_width: pad every batch to this many tokens, draw batches at random and compute by the model itself; None
            pads to the longest example of a batch, makes batches of like length and computes by the fused path.
        cuda_graphs: on a GPU, capture the fused path's passes and replay them.
    """

    device: torch.device
    precision: str = "fp32"
    fixed_width: int | None = None
    cuda_graphs: bool = False

    @property
    def fast(self) -> bool:
        return self.fixed_width is None

    def padding(self, task: Task) -> Padding:
        """How a task's batches are padded."""
        multiple = GPU_WIDTH_MULTIPLE if self.fast and self.device.type == "cuda" else 1
        return Padding(task.pad_token_id, task.pad_left, self.fixed_width, multiple, task.max_length)


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

    The loss of a step is the mean cross-entropy over its examples, whatever the number of micro-batches and processes,
    computed from logits; a method's own term is added once per step and never enters an evaluation.

    Args:
        log: takes one history row, by the names of :mod:`fwlora.experiment.tracking.metrics`.
        report: takes progress, after every flush of step values.

    Raises:
        DivergedError: the loss is no longer finite.
        UserError: a schedule that cannot be.
    """
    processes = Processes(execution.device)
    total_steps = training.total_steps(len(train_split))
    optimizer, scheduler = _make_optimizer(model, training, total_steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    local, remark = make_classifier(
        model, method.pairs, execution.precision, lambda: method.estimator, fast=execution.fast
    )
    if remark:
        logger.info(remark)
    classifier = processes.prepare(local)
    graphs = _make_graphs(local, parameters, execution, processes)
    clock = PhaseClock(execution.device)
    # Every process drops other elements; the first as it would alone.
    torch.manual_seed(training.seed + SEEDS_BETWEEN_PROCESSES * processes.index)
    if execution.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(execution.device)
    step, epoch_rows, step_times = 0, [], []
    evaluation = None
    for epoch in range(training.epochs):
        classifier.train()
        meter = EpochMeter(log, report, processes, total_steps, training.steps_per_epoch(len(train_split)))
        for batches, examples in _epoch_steps(train_split, training, task, execution, processes, epoch):
            step += 1
            with clock.phase("warmup" if method.in_warmup else "train"):
                warming_up = float(method.in_warmup)
                shares = _forward_backward(classifier, method, batches, examples, processes, graphs)
                try:
                    method.after_backward(optimizer)
                except UnmeasuredError as error:
                    raise DivergedError(f"step {step}: {error}; {DIVERGENCE_REMEDY}") from None
                learning_rate = scheduler.get_last_lr()[0]
                norm = _update(optimizer, scheduler, parameters, training.max_gradient_norm)
                method.after_step(step)
                optimizer.zero_grad(set_to_none=graphs is None)
                values = {
                    metrics.GRADIENT_NORM: norm,
                    **method.step_values(),
                    metrics.GLOBAL_STEP: step,
                    metrics.LEARNING_RATE: learning_rate,
                    metrics.FISHER_WARMUP: warming_up,
                }
                meter.add(values, shares, examples)
        with clock.phase("warmup" if method.in_warmup else "train"):
            meter.flush()
        step_times += meter.step_times_s
        with clock.phase("eval"):
            evaluation = evaluate(local, eval_split, training.batch_size, task, execution, processes)
        row = {metrics.GLOBAL_STEP: step, metrics.EPOCH: epoch + 1, **meter.epoch_values(), **evaluation.values}
        log(row)
        epoch_rows.append(row)
    assert evaluation is not None
    return TrainingResult(evaluation, epoch_rows, clock.seconds, step_times, step, peak_memory_mib(execution.device))


@torch.no_grad()
def evaluate(
    classifier: nn.Module,
    split: TokenizedSplit,
    batch_size: int,
    task: Task,
    execution: Execution,
    processes: Processes | None = None,
) -> Evaluation:
    """Cross-entropy, task metrics and predictions of a split, each example counted once; no penalty enters.

    Args:
        classifier: from token ids to logits, as :func:`fwlora.experiment.fused.forward.make_classifier` makes it.
        processes: that share the split; every one gets the whole result.

    Raises:
        DivergedError: the cross-entropy is not finite.
    """
    processes = processes or Processes(execution.device)
    classifier.eval()
    batches = plan_evaluation(split.lengths, EVALUATION_BATCH_FACTOR * batch_size)[processes.index :: processes.count]
    total = torch.zeros((), dtype=torch.float64, device=execution.device)
    predicted: list[Tensor] = []
    for batch in stage(split, batches, execution.padding(task), execution.device):
        logits = classifier(**batch.inputs())
        total += nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        predicted.append(logits.argmax(dim=-1))
    predictions = np.zeros(len(split), dtype=np.int64)
    if batches:
        predictions[np.concatenate(batches)] = torch.cat(predicted).cpu().numpy()
    predictions = processes.sum_array(predictions)
    loss = float(processes.sum(total)) / len(split)
    if not np.isfinite(loss):
        raise DivergedError(f"the evaluation loss is {loss}; {DIVERGENCE_REMEDY}")
    values = metrics.compute_task_metrics(split.labels, predictions, task.num_classes)
    named = {metrics.EVAL_LOSS: loss, **{metrics.eval_name(k): v for k, v in values.items()}}
    return Evaluation(loss, named, predictions)


def _make_optimizer(model: nn.Module, training: TrainingSettings, total_steps: int) -> tuple[Any, Any]:
    """AdamW without decay on biases and normalisation, as transformers' Trainer does it, and the named schedule."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": training.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in trainable)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate, fused=fused)
    warmup = int(np.ceil(training.warmup_ratio * total_steps))
    options = training.lr_scheduler_options
    try:
        return optimizer, get_scheduler(training.lr_scheduler, optimizer, warmup, total_steps, options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"run.training.lr_scheduler = {training.lr_scheduler}, run.training.lr_scheduler_options = {options} with "
            f"learning_rate = {training.learning_rate}: {error}; see transformers.optimization.get_scheduler"
        ) from None


def _make_graphs(
    classifier: nn.Module, parameters: list[nn.Parameter], execution: Execution, processes: Processes
) -> GraphedPasses | None:
    """CUDA graphs where they are wanted and can be: one process on a GPU, by the fused path."""
    alone_on_gpu = execution.device.type == "cuda" and processes.count == 1
    if execution.cuda_graphs and alone_on_gpu and isinstance(classifier, FastClassifier):
        return GraphedPasses(parameters)
    return None


def _update(optimizer: Any, scheduler: Any, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips, and takes the optimiser's and the schedule's step; returns the gradients' norm before clipping."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.step()
    scheduler.step()
    return norm


def _epoch_steps(
    split: TokenizedSplit,
    training: TrainingSettings,
    task: Task,
    execution: Execution,
    processes: Processes,
    epoch: int,
) -> Iterator[tuple[list[Batch], int]]:
    """The epoch's optimiser steps: this process's shares of the micro-batches, and all examples of the step."""
    plan = plan_epoch(split.lengths, training.batch_size, seed=training.seed, epoch=epoch, by_length=execution.fast)
    shares, counted = processes.share(plan)
    staged = stage(split, shares, execution.padding(task), execution.device)
    per_step = training.gradient_accumulation_steps
    for start in range(0, len(plan), per_step):
        batches = []
        for counts in counted[start : start + per_step]:
            batches.append(next(staged))
            if not counts:
                batches[-1].labels.fill_(IGNORED_LABEL)
        yield batches, sum(len(batch) for batch in plan[start : start + per_step])


def _forward_backward(
    classifier: nn.Module,
    method: Method,
    batches: list[Batch],
    examples: int,
    processes: Processes,
    graphs: GraphedPasses | None,
) -> Tensor:
    """Accumulates the gradient of the step's mean loss.

    Returns:
        Shape (2,): this process's part of that mean, and its number of correct predictions.
    """

    def run(batch: Batch, last: bool) -> Tensor:
        logits = classifier(**batch.inputs())
        loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / examples
        correct = (logits.detach().argmax(dim=-1) == batch.labels).sum()
        part = torch.stack([loss.detach(), correct.to(loss.dtype)])
        # Processes' gradients are averaged; their parts of the loss add up.
        loss = loss * processes.count
        term = method.loss_term() if last else None
        (loss if term is None else loss + term).backward()
        return part

    parts = []
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        with processes.accumulating(classifier, last=last):
            # A graph replays no hook and no draw of what measures; nor may a term leave values in its memory.
            if graphs is None or method.in_warmup or method.has_loss_term:
                parts.append(run(batch, last))
            else:
                parts.append(graphs.run(batch, (last, examples), partial(run, last=last)))
    return torch.stack(parts).sum(0)
