"""The training loop: batches, a model and a method; no settings file and no tracker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fwlora.experiment.data.batching import Batch, TokenizedSplit, plan_epoch, plan_evaluation, stage
from fwlora.experiment.engine.cuda_graphs import GraphedPasses
from fwlora.experiment.engine.device import peak_memory_mib
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.meters import DivergedError, EpochMeter, PhaseClock
from fwlora.experiment.engine.optimizer import clip_gradients, make_optimizer, make_schedule
from fwlora.experiment.engine.options import EngineOptions, TrainingOptions
from fwlora.experiment.engine.progress import Progress
from fwlora.experiment.engine.state import TrainState
from fwlora.experiment.engine.task import Task
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.fused.forward import FastClassifier, make_classifier
from fwlora.experiment.methods import Method
from fwlora.experiment.tracking import metrics
from fwlora.regularizer import UnmeasuredError

logger = logging.getLogger(__name__)

EVALUATION_BATCH_FACTOR = 2
# More than the seeds of any study span.
SEEDS_BETWEEN_PROCESSES = 2**33

LogRow = Callable[[Mapping[str, float]], None]


@dataclass
class EvaluationResult:
    """One pass over a split.

    Attributes:
        loss: mean over the examples, of cross-entropy or squared error.
        values: loss and task metrics by their names in :mod:`fwlora.experiment.tracking.metrics`.
        predictions: classes or numbers in data-set order, shape (examples,).
        logits: float32 outputs in data-set order, shape (examples, classes); None where predictions are numbers.
    """

    loss: float
    values: dict[str, float]
    predictions: np.ndarray
    logits: np.ndarray | None = None


@dataclass
class TrainingResult:
    """The outcome of a training.

    Attributes:
        last: evaluation after the last epoch; the only one that is compared.
        epochs: the per-epoch history rows.
        times_s: seconds by phase: ``warmup``, ``train`` (steps after the warm-up) and ``eval``.
        step_times_s: wall-clock seconds of each optimizer step, as means over the steps between two reads of the
            device: on a GPU single steps return before they are done.
        total_steps: optimizer steps taken.
        peak_memory_mib: allocated on the GPU during this training; elsewhere of the whole process, a search included.
        cpu_time_s: seconds that this process computed in warm-up and training, over all its threads.
    """

    last: EvaluationResult
    epochs: list[dict[str, float]] = field(default_factory=list)
    times_s: dict[str, float] = field(default_factory=dict)
    step_times_s: list[float] = field(default_factory=list)
    total_steps: int = 0
    peak_memory_mib: float = 0.0
    cpu_time_s: float = 0.0


def train(
    model: nn.Module,
    method: Method,
    train_split: TokenizedSplit,
    eval_split: TokenizedSplit,
    training: TrainingOptions,
    task: Task,
    engine: EngineOptions,
    *,
    log: LogRow,
    report: Callable[[Progress], None] = lambda progress: None,
    watch: TrainingWatch | None = None,
    resume_from: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train for ``training.epochs`` and evaluate after each.

    The loss of a step is the mean over its examples, whatever the number of micro-batches and processes,
    computed from logits; a method's own term is added once per step and never enters an evaluation.

    Args:
        model: adapted, on the device.
        method: called at every step.
        train_split: examples to train on.
        eval_split: examples to evaluate on.
        training: schedule and step size.
        task: padding, classes and metric.
        engine: where and how to compute.
        log: takes one history row, by the names of :mod:`fwlora.experiment.tracking.metrics`.
        report: takes progress, after every flush of step values.
        watch: called where the state can be saved or the training stopped.
        resume_from: an earlier training's :meth:`TrainState.state_dict`; model and method are built anew. Of one that
            had taken its last step only the evaluation is made.

    Raises:
        DivergedError: the loss or a measurement is no longer finite.
        ScheduleError: a learning-rate schedule that cannot be made.
        ValueError: ``resume_from`` is the state of another method or of other options.
    """
    watch = watch or TrainingWatch()
    state = _make_state(model, method, len(train_split), training, task, engine, log, report)
    step = _TrainingStep(state, training, task, engine)
    _seed_dropout(training.seed, engine.processes)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    if resume_from is not None:
        state.load_state_dict(resume_from)
    evaluation = None
    while state.position.epoch < training.epochs:
        step.classifier.train()
        for batches, examples in _epoch_steps(train_split, training, task, engine, state):
            step.run(batches, examples)
            watch.after_step(state)
        with state.clock.phase(_phase(method)):
            state.meter.flush()
        evaluation = _evaluate_epoch(step.local_classifier, eval_split, training, task, engine, state, watch)
        _finish_epoch(state, evaluation, log)
        watch.after_epoch(state)
    if evaluation is None:
        evaluation = _evaluate_epoch(step.local_classifier, eval_split, training, task, engine, state, watch)
    seconds, step_times_s = state.clock.seconds, state.meter.step_times_s
    peak_mib = peak_memory_mib(engine.device)
    steps, cpu_time_s = state.position.step, state.clock.cpu_seconds
    return TrainingResult(evaluation, state.epoch_rows, seconds, step_times_s, steps, peak_mib, cpu_time_s)


@torch.no_grad()
def evaluate(
    classifier: nn.Module,
    split: TokenizedSplit,
    batch_size: int,
    task: Task,
    engine: EngineOptions,
    between_batches: Callable[[], None] = lambda: None,
) -> EvaluationResult:
    """Compute loss, task metrics and predictions of a split, each example counted once; no penalty enters.

    Args:
        classifier: from token ids to logits, as :func:`fwlora.experiment.fused.forward.make_classifier` makes it.
        split: shared by the processes of ``engine``; every one gets the whole result.
        batch_size: examples per batch in training; an evaluation takes :data:`EVALUATION_BATCH_FACTOR` times as many.
        task: padding and classes.
        engine: where and how to compute.
        between_batches: called before every batch; may raise to end the evaluation.

    Raises:
        DivergedError: the loss is not finite.
    """
    processes = engine.processes
    classifier.eval()
    batches = plan_evaluation(split.lengths, EVALUATION_BATCH_FACTOR * batch_size)[processes.index :: processes.count]
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    outputs: list[Tensor] = []
    for batch in stage(split, batches, task.padding(engine), engine.device):
        between_batches()
        logits = classifier(**batch.inputs())
        total += task.sum_losses(logits, batch.labels)
        outputs.append(logits)
    predictions = task.make_predictions(len(split))
    logits_of_all = np.zeros((len(split), task.num_classes), dtype=np.float32)
    if batches:
        order, joint = np.concatenate(batches), torch.cat(outputs)
        predictions[order] = task.predict(joint).cpu().numpy()
        logits_of_all[order] = joint.float().cpu().numpy()
    predictions, logits_of_all = processes.sum_array(predictions), processes.sum_array(logits_of_all)
    loss = float(processes.sum(total)) / len(split)
    if not np.isfinite(loss):
        raise DivergedError(f"the evaluation loss is {loss}", loss=loss)
    values = task.score(split.labels, predictions)
    named = {metrics.EVAL_LOSS: loss, **{metrics.eval_name(k): v for k, v in values.items()}}
    return EvaluationResult(loss, named, predictions, logits_of_all if task.counts_correct else None)


def _make_state(
    model: nn.Module,
    method: Method,
    examples: int,
    training: TrainingOptions,
    task: Task,
    engine: EngineOptions,
    log: LogRow,
    report: Callable[[Progress], None],
) -> TrainState:
    """Make the state before the first step."""
    total_steps = training.total_steps(examples)
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, total_steps)
    steps_per_epoch = training.steps_per_epoch(examples)
    meter = EpochMeter(log, report, engine.processes, total_steps, steps_per_epoch, task.counts_correct)
    return TrainState(model, method, optimizer, schedule, meter, PhaseClock(engine.device), engine.device)


def _seed_dropout(seed: int, processes: Processes) -> None:
    """Seed torch so that every process draws other masks; the first process draws those of a single one."""
    torch.manual_seed(seed + SEEDS_BETWEEN_PROCESSES * processes.index)


def _phase(method: Method) -> str:
    return "warmup" if method.in_warmup else "train"


def _evaluate_epoch(
    classifier: nn.Module,
    split: TokenizedSplit,
    training: TrainingOptions,
    task: Task,
    engine: EngineOptions,
    state: TrainState,
    watch: TrainingWatch,
) -> EvaluationResult:
    """Evaluate between two epochs, under the clock's phase ``eval``."""
    with state.clock.phase("eval"):
        try:
            between_batches = partial(watch.during_evaluation, state)
            return evaluate(classifier, split, training.batch_size, task, engine, between_batches)
        except DivergedError as error:
            reached = state.position.step
            raise DivergedError(f"{error} after step {reached}", loss=error.loss, step=reached) from None


def _finish_epoch(state: TrainState, evaluation: EvaluationResult, log: LogRow) -> None:
    """Log the epoch's row and start the next epoch."""
    position = state.position
    position.epoch, position.step_in_epoch = position.epoch + 1, 0
    row = {
        metrics.GLOBAL_STEP: position.step,
        metrics.EPOCH: position.epoch,
        **state.meter.epoch_values(),
        **evaluation.values,
    }
    log(row)
    state.epoch_rows.append(row)
    state.meter.start_epoch()


def _epoch_steps(
    split: TokenizedSplit, training: TrainingOptions, task: Task, engine: EngineOptions, state: TrainState
) -> Iterator[tuple[list[Batch], int]]:
    """The epoch's optimizer steps that are left: this process's shares of the micro-batches, and all examples."""
    by_length, epoch = engine.group_by_length, state.position.epoch
    plan = plan_epoch(split.lengths, training.batch_size, seed=training.seed, epoch=epoch, by_length=by_length)
    per_step = training.gradient_accumulation_steps
    plan = plan[state.position.step_in_epoch * per_step :]
    shares, counted = engine.processes.share(plan)
    staged = stage(split, shares, task.padding(engine), engine.device)
    for start in range(0, len(plan), per_step):
        batches = []
        for counts in counted[start : start + per_step]:
            batches.append(next(staged))
            if not counts:
                task.ignore(batches[-1].labels)
        yield batches, sum(len(batch) for batch in plan[start : start + per_step])


class _TrainingStep:
    """One optimizer step of a training.

    Attributes:
        local_classifier: from token ids to logits, in this process.
        classifier: the same with gradients averaged over processes.
    """

    def __init__(self, state: TrainState, training: TrainingOptions, task: Task, engine: EngineOptions) -> None:
        self._state, self._training, self._task, self._processes = state, training, task, engine.processes
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        method = state.method
        self.local_classifier, remark = make_classifier(
            state.model,
            method.pairs,
            engine.precision,
            lambda: method.estimator,
            fast=engine.fused,
            kernels=engine.kernels,
        )
        if remark:
            logger.info(remark)
        if engine.kernels is not None:
            method.use_kernels(engine.kernels)
        self.classifier = engine.processes.prepare(self.local_classifier)
        self._graphs = _make_graphs(self.local_classifier, self._parameters, engine)

    def run(self, batches: list[Batch], examples: int) -> None:
        """Take the step.

        Args:
            batches: this process's micro-batches.
            examples: of the step, in all processes.
        """
        state, method, position = self._state, self._state.method, self._state.position
        with state.clock.phase(_phase(method)):
            warming_up = float(method.in_warmup)
            shares = self._forward_backward(batches, examples)
            try:
                method.after_backward(state.optimizer)
            except UnmeasuredError as error:
                step = position.step + 1
                raise DivergedError(f"step {step}: {error}", step=step) from None
            learning_rate = state.scheduler.get_last_lr()[0]
            norm = clip_gradients(self._parameters, self._training.max_gradient_norm)
            state.optimizer.step()
            state.scheduler.step()
            position.step, position.step_in_epoch = position.step + 1, position.step_in_epoch + 1
            method.after_step(position.step)
            state.optimizer.zero_grad(set_to_none=self._graphs is None)
            values = {
                metrics.GRADIENT_NORM: norm,
                **method.step_values(),
                metrics.GLOBAL_STEP: position.step,
                metrics.LEARNING_RATE: learning_rate,
                metrics.FISHER_WARMUP: warming_up,
            }
            state.meter.add(values, shares, examples)

    def _forward_backward(self, batches: list[Batch], examples: int) -> Tensor:
        """Accumulate the gradient of the step's mean loss.

        Returns:
            Shape (2,): this process's part of that mean, and its number of correct predictions.
        """
        method, graphs, parts = self._state.method, self._graphs, []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self._processes.accumulating(self.classifier, last=last):
                # A graph replays neither hooks nor random draws, and a loss term must not keep tensors of its memory.
                if graphs is None or method.in_warmup or method.has_loss_term:
                    parts.append(self._pass(batch, examples, last))
                else:
                    eager = partial(self._pass, examples=examples, last=last)
                    parts.append(graphs.run(batch, (last, examples), eager))
        return torch.stack(parts).sum(0)

    def _pass(self, batch: Batch, examples: int, last: bool) -> Tensor:
        """Run one micro-batch forward and backward; the last one of a step with the method's loss term."""
        logits = self.classifier(**batch.inputs())
        loss = self._task.sum_losses(logits, batch.labels) / examples
        correct = self._task.count_correct(logits.detach(), batch.labels)
        part = torch.stack([loss.detach(), correct.to(loss.dtype)])
        # Processes' gradients are averaged; their parts of the loss add up.
        loss = loss * self._processes.count
        term = self._state.method.loss_term() if last else None
        (loss if term is None else loss + term).backward()
        return part


def _make_graphs(classifier: nn.Module, parameters: list[nn.Parameter], engine: EngineOptions) -> GraphedPasses | None:
    """CUDA graphs where they are possible: one process on a GPU, by the fused path."""
    alone_on_gpu = engine.device.type == "cuda" and engine.processes.count == 1
    if engine.cuda_graphs and alone_on_gpu and isinstance(classifier, FastClassifier):
        return GraphedPasses(parameters)
    return None
