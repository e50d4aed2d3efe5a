"""The parts of ``src.train`` beside the training: inputs, log lines, messages and summary of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fwlora.budget import MatrixShape
from fwlora.config import RankPlan
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.text import TaskData
from fwlora.experiment.data.tokenization import describe_cut
from fwlora.experiment.engine.device import UnavailableDeviceError, choose_device, name_device
from fwlora.experiment.engine.distributed import Processes, is_main_process
from fwlora.experiment.engine.loop import TrainingResult
from fwlora.experiment.engine.meters import DivergedError
from fwlora.experiment.engine.optimizer import ScheduleError
from fwlora.experiment.engine.options import EngineOptions, Precision
from fwlora.experiment.engine.precision import DTYPES, Timings, cached_timings, choose_precision, time_products
from fwlora.experiment.engine.task import Task, make_task
from fwlora.experiment.errors import UserError
from fwlora.experiment.fused.compiled import Kernels, NoKernelsError, load_kernels
from fwlora.experiment.json_types import JsonObject
from fwlora.experiment.modeling.build import AdaptedModel, final_adapter_parameters
from fwlora.experiment.paths import machine_cache
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.tracking import metrics
from fwlora.experiment.tracking.environment import describe_environment
from fwlora.experiment.tracking.facts import RunFacts
from fwlora.experiment.tracking.records import pack_logits, pack_values

logger = logging.getLogger(__name__)

DIVERGENCE_REMEDIES = {
    "loss": "lower run.training.learning_rate, or set run.training.max_gradient_norm=1.0",
    "term": "lower its weight, such as run.fw_lora.lambda_fw or run.adalora.orth_reg_weight",
}


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run needs and that its search trials and its final training share.

    Attributes:
        data: texts and labels of both splits.
        tokenizer: of the model.
        plan: a rank for every targeted matrix.
        task: padding, classes and metric.
        engine: where and how to compute.
        train: tokens of the training split.
        evaluation: tokens of the evaluation split.
        timings: what the precision was chosen by; None where there was no choice.
        search: tokens that the trials of a search train on and are scored on; None without a search.
    """

    data: TaskData
    tokenizer: Any
    plan: RankPlan
    task: Task
    engine: EngineOptions
    train: TokenizedSplit
    evaluation: TokenizedSplit
    timings: Timings | None = None
    search: tuple[TokenizedSplit, TokenizedSplit] | None = None


def print_log_lines() -> None:
    """Print what this package logs to stdout, line by line; of several processes only the first one prints."""
    package = logging.getLogger("fwlora")
    package.setLevel(logging.INFO)
    package.propagate = False
    handler = logging.StreamHandler(sys.stdout) if is_main_process() else logging.NullHandler()
    package.handlers = [handler]
    # Hydra disables every logger that exists when it starts, which keeps other packages quiet.
    for name, other in logging.root.manager.loggerDict.items():
        if name.startswith("fwlora") and isinstance(other, logging.Logger):
            other.disabled = False


def choose_engine(settings: ProgramSettings, matrices: Sequence[MatrixShape]) -> tuple[EngineOptions, Timings | None]:
    """Choose device, precision and forward path; ``engine.fast=false`` pads literally and computes by the model itself.

    Args:
        settings: of the run and the program.
        matrices: of the model, whose products may be timed.

    Returns:
        The options, and what the precision was chosen by; None where there was no choice.

    Raises:
        UserError: a GPU is set and there is none, or a precision that the run does not allow.
    """
    try:
        processes = Processes(choose_device(settings.engine.device))
    except UnavailableDeviceError as error:
        raise UserError(f"engine.device = {error.name}: {error}; use engine.device=cpu or auto") from None
    precision, timings = _choose_precision(settings, matrices, processes)
    fast, dataset = settings.engine.fast, settings.run.dataset
    pad_to = dataset.max_length if dataset.padding == "max_length" and not fast else None
    wants_kernels = fast and settings.engine.compiled and processes.device.type == "cpu"
    options = EngineOptions(
        processes,
        precision,
        pad_to,
        group_by_length=fast and settings.engine.batches == "by_length",
        fused=fast,
        cuda_graphs=settings.engine.cuda_graphs,
        kernels=_compile_kernels(precision) if wants_kernels else None,
    )
    return options, timings


def _choose_precision(
    settings: ProgramSettings, matrices: Sequence[MatrixShape], processes: Processes
) -> tuple[Precision, Timings | None]:
    """Return the precision that is set, or the faster one of those that the run allows, the same in all processes."""
    allowed, wanted = settings.run.training.mixed_precision, settings.engine.precision
    if wanted == "bf16" and allowed == "fp32":
        raise UserError(
            "engine.precision = bf16: run.training.mixed_precision = fp32 does not allow it; set that to bf16, or "
            "engine.precision=auto"
        )
    if wanted != "auto":
        return wanted, None
    found: list[Timings] = []

    def measure() -> Timings:
        shapes = [(matrix.out_features, matrix.in_features) for matrix in matrices]
        timed = partial(time_products, shapes, processes.device)
        found.append(cached_timings(machine_cache(), shapes, processes.device, timed))
        return found[0]

    precision, remark = choose_precision(allowed, measure)
    if remark:
        logger.info(remark)
    chosen = torch.tensor(float(precision == "bf16" and processes.index == 0), device=processes.device)
    return ("bf16" if float(processes.sum(chosen)) else "fp32"), (found[0] if found else None)


def _compile_kernels(precision: Precision) -> Kernels | None:
    try:
        return load_kernels(DTYPES[precision])
    except NoKernelsError as error:
        logger.info(f"layers are computed by torch's operations, as kernels cannot be compiled: {error}")
        return None


def describe_task(settings: ProgramSettings, data: TaskData, tokenizer: Any) -> Task:
    """Return the task as the engine takes it.

    Raises:
        UserError: the tokenizer has no token to pad with.
    """
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_token_id is None:
        raise UserError(
            f"run.model.pretrained_id = {settings.run.model.pretrained_id!r}: its tokenizer has neither a padding nor "
            "an end-of-text token; set one of them in tokenizer_config.json"
        )
    return make_task(
        pad_token_id,
        len(data.label_names),
        data.task_metric,
        pad_left=tokenizer.padding_side == "left",
        max_length=settings.run.dataset.max_length,
    )


def log_run(settings: ProgramSettings, inputs: RunInputs) -> None:
    """Log what is about to run: run, data and ranks."""
    run, data, plan = settings.run, inputs.data, inputs.plan
    labels = f"classes {', '.join(data.label_names)}" if data.label_names else "labels are numbers"
    logger.info(f"run {run.run_id}: {run.method}, seed {run.training.seed}, mode {settings.mode}")
    logger.info(
        f"data {' '.join(filter(None, (run.dataset.name, run.dataset.subset)))}: {len(data.train.labels)} training and "
        f"{len(data.evaluation.labels)} evaluation examples, {labels}"
    )
    for name, split in (("training", inputs.train), ("evaluation", inputs.evaluation)):
        told = describe_cut(name, split, run.dataset)
        if told:
            logger.warning(told)
    if not run.model.lora.enabled:
        logger.info("model.lora.enabled is false: only the classification head is trained")
        return
    used = [rank for rank in plan.ranks.values() if rank]
    logger.info(
        f"budget {plan.budget:,} of {plan.encoder_parameters:,} encoder parameters "
        f"({100 * plan.budget / plan.encoder_parameters:.3f} %): ranks {min(used)} to {max(used)} on {len(used)} of "
        f"{len(plan.ranks)} matrices, scaling {run.model.lora.scaling:g}"
    )


def collect_facts(inputs: RunInputs, repository: Path, command: str | None) -> RunFacts:
    """Collect what the program found out and evaluation needs, beside the settings.

    Args:
        inputs: of the run.
        repository: the checkout whose commit is recorded.
        command: that made the run, where it is known.
    """
    data, device = inputs.data, name_device(inputs.engine.device)
    return RunFacts(
        task=data.task,
        label_names=tuple(data.label_names),
        primary_metric=metrics.eval_name(data.task_metric),
        precision=inputs.engine.precision,
        product_times_ms={name: 1e3 * seconds for name, seconds in (inputs.timings or {}).items()} or None,
        kernels="torch" if inputs.engine.kernels is None else "compiled",
        train_examples=len(data.train.labels),
        eval_examples=len(data.evaluation.labels),
        train_fingerprint=data.train.fingerprint,
        eval_fingerprint=data.evaluation.fingerprint,
        train_examples_cut=inputs.train.cut,
        eval_examples_cut=inputs.evaluation.cut,
        command=command,
        environment=describe_environment(repository, device, torch.get_num_threads()),
    )


@contextmanager
def engine_errors_name_settings() -> Iterator[None]:
    """Turn the engine's errors of the block into messages that name settings.

    Raises:
        UserError: the training diverged, or its schedule cannot be made.
    """
    try:
        yield
    except DivergedError as error:
        raise UserError(f"{error}; {DIVERGENCE_REMEDIES[error.cause]}") from None
    except ScheduleError as error:
        raise UserError(
            f"run.training.lr_scheduler = {error.name}, run.training.lr_scheduler_options = {error.options} with "
            f"learning_rate = {error.learning_rate}: {error.reason}; see transformers.optimization.get_scheduler"
        ) from None


def summarize_run(result: TrainingResult, adapted: AdaptedModel, inputs: RunInputs, search_time_s: float) -> JsonObject:
    """Return the run's final values, by the names of :mod:`fwlora.experiment.tracking.metrics`.

    Args:
        result: of the final training.
        adapted: the trained model.
        inputs: of the run.
        search_time_s: seconds that the search took; 0 without one.
    """
    table = adapted.method.adapter_table()
    final_parameters = final_adapter_parameters(adapted.method)
    classes, times = inputs.task.num_classes, result.times_s
    summary: JsonObject = {
        metrics.PRIMARY_METRIC: metrics.eval_name(inputs.task.task_metric),
        metrics.TRAINING_TIME_S: times["warmup"] + times["train"],
        metrics.TIME_WARMUP_S: times["warmup"],
        metrics.TIME_TRAIN_S: times["train"],
        metrics.TIME_EVAL_S: times["eval"],
        metrics.TIME_SEARCH_S: search_time_s,
        metrics.CPU_TIME_S: result.cpu_time_s,
        metrics.LOAD_AVERAGE: os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        metrics.STEP_TIME_MEDIAN_S: float(np.median(result.step_times_s)),
        metrics.PEAK_MEMORY_MIB: result.peak_memory_mib,
        metrics.TOTAL_STEPS: result.total_steps,
        **adapted.counts,
        metrics.PARAMS_ADAPTER_FINAL: final_parameters,
        metrics.ADAPTER_PERCENT_OF_ENCODER: 100 * final_parameters / inputs.plan.encoder_parameters,
        metrics.MODULE_NAMES: table.names,
        metrics.MODULE_RANKS: table.ranks,
        metrics.MODULE_IMPORTANCES: table.importances,
        metrics.MODULE_DELTA_NORMS: table.delta_norms,
        metrics.EVAL_PREDICTIONS: pack_values(result.last.predictions, classes),
        metrics.EVAL_LABELS: pack_values(inputs.evaluation.labels, classes),
        metrics.EVAL_LOGITS: None if result.last.logits is None else pack_logits(result.last.logits),
        metrics.ENCODER_FINGERPRINT: adapted.encoder_fingerprint,
        metrics.EVAL_FINGERPRINT: inputs.data.evaluation.fingerprint,
    }
    for name, value in result.last.values.items():
        best = (min if name == metrics.EVAL_LOSS else max)(result.epochs, key=lambda row: row[name])
        summary[metrics.final_name(name)] = value
        summary[metrics.best_name(name)] = best[name]
        summary[metrics.best_epoch_name(name)] = best[metrics.EPOCH]
    return summary


def log_outcome(summary: JsonObject) -> None:
    """Log the value that is compared, the training's time and its size."""
    primary = summary[metrics.PRIMARY_METRIC]
    logger.info(
        f"{primary} {summary[metrics.final_name(primary)]:.4f} after the last epoch; "
        f"training {summary[metrics.TRAINING_TIME_S]:.1f} s, "
        f"adapter parameters in use {summary[metrics.PARAMS_ADAPTER_FINAL]:,}"
    )
