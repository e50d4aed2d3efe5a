"""Trains one run: settings -> data -> model and method -> (search) -> training -> record.

Started by ``src.main`` as a subprocess; takes the same arguments.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fwlora.adapters import save_adapter
from fwlora.config import RankPlan
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.text import TaskData
from fwlora.experiment.engine.device import choose_device, choose_precision, keep_freed_memory, name_device
from fwlora.experiment.engine.distributed import Processes, is_main_process
from fwlora.experiment.engine.loop import Execution, Task, TrainingResult, train
from fwlora.experiment.engine.meters import DivergedError
from fwlora.experiment.errors import UserError, user_errors_exit
from fwlora.experiment.modeling.build import AdaptedModel, check_max_length, final_adapter_parameters, load_tokenizer
from fwlora.experiment.paths import CONFIG_DIR, REPOSITORY
from fwlora.experiment.search import InfeasibleTrial, SearchResult, search, trial_settings
from fwlora.experiment.settings.hydra_arguments import enter_program, restore_command, settings_of
from fwlora.experiment.settings.resolve import check_schedules, fit_trial_to_data
from fwlora.experiment.settings.schema import ProgramSettings, RunSettings
from fwlora.experiment.study.progress import ProgressPrinter
from fwlora.experiment.tracking import NullTracker, Tracker, metrics, open_tracker
from fwlora.experiment.tracking.environment import describe_environment
from fwlora.experiment.tracking.records import pack_classes
from src.model import build_model, plan_adapters
from src.preprocess import load_task, tokenize_search_task, tokenize_task

# Below the logger of the package, whatever name this module is started under.
logger = logging.getLogger("fwlora.train")


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs that does not change between search trials and the final training."""

    data: TaskData
    tokenizer: Any
    plan: RankPlan
    task: Task
    execution: Execution


def print_log_lines() -> None:
    """Print what this package logs to stdout, a line at once; of several processes the main one prints."""
    package = logging.getLogger("fwlora")
    package.setLevel(logging.INFO)
    package.propagate = False
    handler = logging.StreamHandler(sys.stdout) if is_main_process() else logging.NullHandler()
    package.handlers = [handler]
    # Hydra disables every logger that exists when it starts, which keeps other packages quiet.
    for name, other in logging.root.manager.loggerDict.items():
        if name.startswith("fwlora") and isinstance(other, logging.Logger):
            other.disabled = False


def run_training(settings: ProgramSettings, command: str | None = None) -> None:
    """One whole run, recorded by the tracker that the settings name.

    Args:
        settings: of the run and the program.
        command: that made it, to be recorded.

    Raises:
        UserError: input that cannot make a run; before any weight is loaded, wherever that can be known.
    """
    prepared = prepare(settings)
    if settings.mode == "trial":
        settings = fit_trial_to_data(settings, len(prepared.data.train.labels))
    run = settings.run
    describe(settings, prepared)
    total_steps = run.training.total_steps(len(prepared.data.train.labels))
    if run.model.lora.enabled and run.optuna.n_trials == 0:
        check_schedules(run, total_steps)
    directory = Path(settings.results_dir) / run.run_id
    config = {**settings.as_record(), "resolved": resolved_facts(settings, prepared, command)}
    tracker: Tracker = NullTracker()
    if is_main_process():
        tracker = open_tracker(settings, run_id=run.run_id, config=config, directory=directory)
    exit_code = 1
    try:
        found, search_time_s = None, 0.0
        if run.optuna.n_trials:
            started = time.perf_counter()
            found = run_search(run, prepared)
            search_time_s = time.perf_counter() - started
            run = run.with_values(found.best_values)
            tracker.update_config({"run": run.model_dump(), "search": found.as_record()})
        train_and_record(run, prepared, tracker, found, search_time_s, directory if settings.mode == "full" else None)
        exit_code = 0
    finally:
        tracker.finish(exit_code)


def prepare(settings: ProgramSettings) -> Prepared:
    """Ranks, data and tokens, in the order that finds mistakes earliest."""
    run = settings.run
    keep_freed_memory()
    processes = Processes(choose_device(settings.engine.device))
    device = processes.device
    precision, remark = choose_precision(run.training.mixed_precision, device)
    if remark:
        logger.info(remark)
    plan = plan_adapters(run.model)
    check_max_length(run.model, run.dataset.max_length)
    with processes.main_first():
        data = load_task(run.dataset)
    tokenizer = load_tokenizer(run.model)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_token_id is None:
        raise UserError(
            f"run.model.pretrained_id = {run.model.pretrained_id!r}: its tokenizer has neither a padding nor an "
            "end-of-text token; set one of them in tokenizer_config.json"
        )
    task = Task(
        pad_token_id, len(data.label_names), data.task_metric, tokenizer.padding_side == "left", run.dataset.max_length
    )
    width = None if settings.engine.fast else run.dataset.max_length
    graphs = settings.engine.cuda_graphs
    return Prepared(data, tokenizer, plan, task, Execution(device, precision, width, graphs))


def describe(settings: ProgramSettings, prepared: Prepared) -> None:
    """Says what is about to run."""
    run, data, plan = settings.run, prepared.data, prepared.plan
    logger.info(f"run {run.run_id}: {run.method}, seed {run.training.seed}, mode {settings.mode}")
    logger.info(
        f"data {' '.join(filter(None, (run.dataset.name, run.dataset.subset)))}: {len(data.train.labels)} training and "
        f"{len(data.evaluation.labels)} evaluation examples, classes {', '.join(data.label_names)}"
    )
    if not run.model.lora.enabled:
        logger.info("model.lora.enabled is false: only the classification head is trained")
        return
    used = [rank for rank in plan.ranks.values() if rank]
    logger.info(
        f"budget {plan.budget:,} of {plan.encoder_parameters:,} encoder parameters "
        f"({100 * plan.budget / plan.encoder_parameters:.3f} %): ranks {min(used)} to {max(used)} on {len(used)} of "
        f"{len(plan.ranks)} matrices, scaling {run.model.lora.scaling:g}"
    )


def resolved_facts(settings: ProgramSettings, prepared: Prepared, command: str | None) -> dict[str, Any]:
    """What the program found out and evaluation needs, beside the settings."""
    data, device = prepared.data, name_device(prepared.execution.device)
    return {
        "task": data.task,
        "label_names": list(data.label_names),
        "primary_metric": metrics.eval_name(data.task_metric),
        "precision": prepared.execution.precision,
        "train_examples": len(data.train.labels),
        "eval_examples": len(data.evaluation.labels),
        "train_fingerprint": data.train.fingerprint,
        "eval_fingerprint": data.evaluation.fingerprint,
        "command": command,
        "environment": describe_environment(REPOSITORY, device, torch.get_num_threads()),
    }


def run_search(run: RunSettings, prepared: Prepared) -> SearchResult:
    """Trials on a fixed part of train, scored on another; the reported split is never looked at."""
    train_split, heldout_split = tokenize_search_task(prepared.data, prepared.tokenizer, run)
    logger.info(
        f"search: {run.optuna.n_trials} trials of {run.optuna.epochs} epoch(s) on {len(train_split)} training "
        f"examples, objective {prepared.task.task_metric} on {len(heldout_split)} held-out ones"
    )

    def objective(candidate: RunSettings) -> float:
        trial = trial_settings(candidate, len(prepared.data.train.labels), len(train_split))
        trial_plan = plan_adapters(trial.model) if trial.model != run.model else prepared.plan
        adapted = build(trial, trial_plan, prepared, trial.training.total_steps(len(train_split)))
        try:
            result = train(
                adapted.model,
                adapted.method,
                train_split,
                heldout_split,
                trial.training,
                prepared.task,
                prepared.execution,
                log=lambda row: None,
                report=ProgressPrinter(),
            )
        except DivergedError as error:
            raise InfeasibleTrial(str(error).partition(";")[0]) from None
        return result.last.values[metrics.eval_name(prepared.task.task_metric)]

    return search(run, objective)


def build(run: RunSettings, plan: RankPlan, prepared: Prepared, total_steps: int) -> AdaptedModel:
    """The adapted model of these settings, on the device."""
    task, device = prepared.task, prepared.execution.device
    return build_model(run, plan, task.num_classes, task.pad_token_id, total_steps, device)


def train_and_record(
    run: RunSettings,
    prepared: Prepared,
    tracker: Tracker,
    found: SearchResult | None,
    search_time_s: float,
    directory: Path | None,
) -> None:
    """The training that counts. Its adapter is saved under ``directory``, unless that is None."""
    train_split, eval_split = tokenize_task(prepared.data, prepared.tokenizer, run.dataset)
    total_steps = run.training.total_steps(len(train_split))
    if found:
        check_schedules(run, total_steps)
    adapted = build(run, prepared.plan if found is None else plan_adapters(run.model), prepared, total_steps)
    counts = adapted.counts
    logger.info(
        f"parameters: adapter {counts[metrics.PARAMS_ADAPTER]:,}, head {counts[metrics.PARAMS_HEAD]:,}, "
        f"total {counts[metrics.PARAMS_TOTAL]:,}"
    )
    result = train(
        adapted.model,
        adapted.method,
        train_split,
        eval_split,
        run.training,
        prepared.task,
        prepared.execution,
        log=tracker.log,
        report=ProgressPrinter(),
    )
    summary = summarise(result, adapted, prepared, eval_split, search_time_s)
    tracker.set_summary(summary)
    if directory is not None and is_main_process():
        save_checkpoint(adapted, prepared, directory / "checkpoint")
    tracker.set_summary({metrics.COMPLETED: True})
    primary = metrics.eval_name(prepared.task.task_metric)
    logger.info(
        f"{primary} {summary[metrics.final_name(primary)]:.4f} after the last epoch; "
        f"training {summary[metrics.TRAINING_TIME_S]:.1f} s, "
        f"adapter parameters in use {summary[metrics.PARAMS_ADAPTER_FINAL]:,}"
    )


def summarise(
    result: TrainingResult, adapted: AdaptedModel, prepared: Prepared, eval_split: TokenizedSplit, search_time_s: float
) -> dict[str, Any]:
    """The run's final values, by the names of :mod:`fwlora.experiment.tracking.metrics`."""
    table = adapted.method.adapter_table()
    final_parameters = final_adapter_parameters(adapted.method)
    classes = prepared.task.num_classes
    times = result.times_s
    summary: dict[str, Any] = {
        metrics.PRIMARY_METRIC: metrics.eval_name(prepared.task.task_metric),
        metrics.TRAINING_TIME_S: times["warmup"] + times["train"],
        metrics.TIME_WARMUP_S: times["warmup"],
        metrics.TIME_TRAIN_S: times["train"],
        metrics.TIME_EVAL_S: times["eval"],
        metrics.TIME_SEARCH_S: search_time_s,
        metrics.STEP_TIME_MEDIAN_S: float(np.median(result.step_times_s)),
        metrics.PEAK_MEMORY_MIB: result.peak_memory_mib,
        metrics.TOTAL_STEPS: result.total_steps,
        **adapted.counts,
        metrics.PARAMS_ADAPTER_FINAL: final_parameters,
        metrics.ADAPTER_PERCENT_OF_ENCODER: 100 * final_parameters / prepared.plan.encoder_parameters,
        metrics.MODULE_NAMES: table.names,
        metrics.MODULE_RANKS: table.ranks,
        metrics.MODULE_IMPORTANCES: table.importances,
        metrics.MODULE_DELTA_NORMS: table.delta_norms,
        metrics.EVAL_PREDICTIONS: pack_classes(result.last.predictions, classes),
        metrics.EVAL_LABELS: pack_classes(eval_split.labels, classes),
        metrics.ENCODER_FINGERPRINT: adapted.encoder_fingerprint,
        metrics.EVAL_FINGERPRINT: prepared.data.evaluation.fingerprint,
    }
    for name, value in result.last.values.items():
        best = (min if name == metrics.EVAL_LOSS else max)(result.epochs, key=lambda row: row[name])
        summary[metrics.final_name(name)] = value
        summary[metrics.best_name(name)] = best[name]
        summary[metrics.best_name(name) + "_epoch"] = best[metrics.EPOCH]
    return summary


def save_checkpoint(adapted: AdaptedModel, prepared: Prepared, folder: Path) -> None:
    """The adapter (or the whole model, where only the head was trained) and the tokenizer, complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(adapted.model, partial)
    prepared.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


@hydra.main(config_path="../config", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's task; user mistakes end in one message and exit code 2."""
    print_log_lines()
    with user_errors_exit():
        overrides = list(HydraConfig.get().overrides.task)
        run_training(settings_of(composed, overrides, CONFIG_DIR), restore_command("src.main", overrides))


if __name__ == "__main__":
    enter_program("src.train", main, CONFIG_DIR)
