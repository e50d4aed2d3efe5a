"""Train one run: settings -> data -> model and method -> (search) -> training -> record.

1. Inputs: ranks, data and tokenizer, in the order that finds mistakes earliest; no weight is loaded before.
2. Search, where ``optuna.n_trials`` is above 0: trials on a part of train, scored on a held-out part of it.
3. Training: per optimizer step forward and backward of its micro-batches, the method's own step, clipping, the
   optimizer's step (:mod:`fwlora.experiment.engine.loop`); after each epoch an evaluation. The last one is compared.
4. Record: every step and every epoch go to the tracker as they come, final values and predictions at the end. A full
   run saves its adapter.

A full run writes checkpoints while it searches and trains; the same command continues it after a stop, to the bytes of
the run that never stopped (:mod:`fwlora.experiment.resume`). ``src.main`` starts this program as a subprocess and hands
its settings over; alone it takes the same arguments.
"""

from __future__ import annotations

from fwlora.experiment.interrupts import end_imports

import logging

import hydra
from omegaconf import DictConfig

from fwlora.config import RankPlan
from fwlora.experiment.engine.device import keep_freed_memory
from fwlora.experiment.engine.distributed import is_main_process, leave_process_group
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.meters import DivergedError
from fwlora.experiment.engine.progress import ProgressPrinter
from fwlora.experiment.modeling.build import AdaptedModel, check_max_length, load_tokenizer
from fwlora.experiment.paths import CONFIG_DIR, REPOSITORY
from fwlora.experiment.pipeline_contract import announce_verdict, watch
from fwlora.experiment.resume.lock import hold_run
from fwlora.experiment.resume.session import RunSession, open_session
from fwlora.experiment.run import (
    RunInputs,
    choose_engine,
    collect_facts,
    describe_task,
    engine_errors_name_settings,
    log_outcome,
    log_run,
    print_log_lines,
    summarize_run,
)
from fwlora.experiment.saved_model import save_model
from fwlora.experiment.search import InfeasibleTrialError, SearchResult, search, trial_settings
from fwlora.experiment.settings.hydra_arguments import Invocation, enter_program, run_task
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.settings.resolve import check_schedules
from fwlora.experiment.settings.schema import ProgramSettings, RunSettings
from fwlora.experiment.stopping import Stopper
from fwlora.experiment.streams import outlive_readers
from fwlora.experiment.tracking import NullTracker, Tracker, metrics, open_tracker
from fwlora.experiment.tracking.facts import RunFacts
from src.model import build_model, plan_adapters
from src.preprocess import load_task, tokenize_search_task, tokenize_task

# Below the logger of the package, whatever name this module is started under.
logger = logging.getLogger("fwlora.train")


def run_training(settings: ProgramSettings, command: str | None = None, stopper: Stopper | None = None) -> Tracker:
    """Carry out one run, recorded by the tracker that the settings name, or what earlier attempts have left of it.

    Args:
        settings: of the run and the program.
        command: that made it, to be recorded.
        stopper: of this process; None of one that is not to take requests to stop.

    Returns:
        What recorded the run; of a run that was finished before, one that kept nothing.

    Raises:
        UserError: input that cannot make a run; before any weight is loaded, wherever that can be known.
        StopRequested: the run was stopped; the same command continues it.
    """
    with hold_run(settings):
        inputs = prepare_inputs(settings)
        settings = get_mode(settings.mode).fit(settings, len(inputs.data.train.labels))
        run = settings.run
        log_run(settings, inputs)
        if run.model.lora.enabled and run.optuna.n_trials == 0:
            check_schedules(run, run.training.total_steps(len(inputs.data.train.labels)))
        facts = collect_facts(inputs, REPOSITORY, command)
        session = open_session(settings, facts, inputs.engine.processes, stopper or Stopper())
        tracker: Tracker = NullTracker()
        if session.is_finished:
            logger.info(f"run {run.run_id} is finished, see {session.directory}; resume=never makes it anew")
            return tracker
        if is_main_process():
            config = {**settings.as_record(), "resolved": facts.as_record(), **session.as_record()}
            tracker = open_tracker(settings, run_id=run.run_id, config=config, directory=session.directory)
            tracker = watch(tracker, settings.mode)
        with session.recording(tracker):
            found = None
            if run.optuna.n_trials:
                found = run_search(run, inputs, session)
                run = run.with_values(found.best_values)
                tracker.update_config({"run": run.model_dump(), "search": found.as_record()})
            with session.deferring_stops():
                train_and_record(run, inputs, facts, tracker, found, session)
        return tracker


def prepare_inputs(settings: ProgramSettings) -> RunInputs:
    """Prepare what the search and the training share, tokens included; the process keeps memory that it frees.

    Raises:
        UserError: a model, data or an engine that cannot make the run.
    """
    run = settings.run
    keep_freed_memory()
    plan = plan_adapters(run.model)
    engine, timings = choose_engine(settings, plan.matrices)
    check_max_length(run.model, run.dataset.max_length)
    with engine.processes.main_first():
        data = load_task(run.dataset)
    tokenizer = load_tokenizer(run.model)
    task = describe_task(settings, data, tokenizer)
    train_split, eval_split = tokenize_task(data, tokenizer, run.dataset)
    search_splits = tokenize_search_task(data, tokenizer, run) if run.optuna.n_trials else None
    return RunInputs(data, tokenizer, plan, task, engine, train_split, eval_split, timings, search_splits)


def run_search(run: RunSettings, inputs: RunInputs, session: RunSession) -> SearchResult:
    """Search on a fixed part of train, scored on another; the reported split selects nothing.

    Args:
        run: settings whose ``optuna`` node says what to do.
        inputs: of the run.
        session: keeps the trials that are finished.

    Raises:
        UserError: no trial can make a run.
    """
    assert inputs.search is not None
    train_split, heldout_split = inputs.search
    logger.info(
        f"search: {run.optuna.n_trials} trials of {run.optuna.epochs} epoch(s) on {len(train_split)} training "
        f"examples, objective {inputs.task.task_metric} on {len(heldout_split)} held-out ones"
    )

    def objective(candidate: RunSettings) -> float:
        trial = trial_settings(candidate, len(inputs.data.train.labels), len(train_split))
        trial_plan = plan_adapters(trial.model) if trial.model != run.model else inputs.plan
        adapted = build_adapted(trial, trial_plan, inputs, trial.training.total_steps(len(train_split)))
        try:
            result = train(
                adapted.model,
                adapted.method,
                train_split,
                heldout_split,
                trial.training.options,
                inputs.task,
                inputs.engine,
                log=lambda row: None,
                report=ProgressPrinter(),
            )
        except DivergedError as error:
            raise InfeasibleTrialError(str(error)) from None
        return result.last.values[metrics.eval_name(inputs.task.task_metric)]

    with engine_errors_name_settings():
        return search(run, objective, session.trials)


def build_adapted(run: RunSettings, plan: RankPlan, inputs: RunInputs, total_steps: int) -> AdaptedModel:
    """Build the adapted model of these settings, on the device."""
    task = inputs.task
    return build_model(run, plan, task.num_classes, task.pad_token_id, total_steps, inputs.engine.device)


def train_and_record(
    run: RunSettings,
    inputs: RunInputs,
    facts: RunFacts,
    tracker: Tracker,
    found: SearchResult | None,
    session: RunSession,
) -> None:
    """Carry out the training that is compared, from where the session continues.

    Args:
        run: with the values that a search found.
        inputs: of the run.
        facts: of the run, for the saved model's card.
        tracker: takes every row and the summary.
        found: by the search, if there was one.
        session: of this attempt; says where the model is saved.

    Raises:
        UserError: a schedule that does not fit, or a training that diverged.
    """
    total_steps = run.training.total_steps(len(inputs.train))
    if found:
        check_schedules(run, total_steps)
    adapted = build_adapted(run, inputs.plan if found is None else plan_adapters(run.model), inputs, total_steps)
    counts = adapted.counts
    logger.info(
        f"parameters: adapter {counts[metrics.PARAMS_ADAPTER]:,}, head {counts[metrics.PARAMS_HEAD]:,}, "
        f"total {counts[metrics.PARAMS_TOTAL]:,}"
    )
    history = session.open_history(tracker)
    with engine_errors_name_settings():
        result = train(
            adapted.model,
            adapted.method,
            inputs.train,
            inputs.evaluation,
            run.training.options,
            inputs.task,
            inputs.engine,
            log=history.add,
            report=ProgressPrinter(),
            watch=session.open_watch(history, run),
            resume_from=session.load(history, run),
        )
    summary = summarize_run(result, adapted, inputs, found.seconds if found else 0.0)
    tracker.set_summary(summary)
    if session.adapter_folder is not None and is_main_process():
        final_value = summary[metrics.final_name(summary[metrics.PRIMARY_METRIC])]
        save_model(adapted, inputs.tokenizer, run, facts, final_value, session.adapter_folder)
    tracker.set_summary({metrics.COMPLETED: True})
    log_outcome(summary)


def run(invocation: Invocation) -> None:
    """Carry out the training that was asked for."""
    outlive_readers()
    stopper = Stopper()
    stopper.install()
    print_log_lines()
    tracker = run_training(invocation.settings, invocation.command, stopper)
    leave_process_group()
    announce_verdict(tracker)


@hydra.main(config_path="../config", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Hydra's task."""
    run_task(composed, run, CONFIG_DIR)


if __name__ == "__main__":
    end_imports()
    enter_program("src.train", main, run, CONFIG_DIR)
