"""Hyper-parameter search by Optuna, on data and a budget of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods import get_method
from fwlora.experiment.resume.trials import FinishedTrial, TrialLog
from fwlora.experiment.settings.schema import RunSettings
from fwlora.experiment.settings.search_space import Categorical, IntRange, LogUniform

logger = logging.getLogger(__name__)


class InfeasibleTrialError(Exception):
    """Sampled values that cannot make a run, with the reason."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best_values: name in the search space -> value.
        best_objective: primary metric on the held-out part of train.
        completed_trials: trials that were trained.
        infeasible_trials: trials whose values could not make a run.
        dropped_dimensions: names in the search space that were not searched, with the reason.
        seconds: that all trials took.
    """

    best_values: JsonObject
    best_objective: float
    completed_trials: int
    infeasible_trials: int
    dropped_dimensions: dict[str, str] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    def as_record(self) -> JsonObject:
        """Return plain values for the run's record."""
        return {
            "best_values": self.best_values,
            "best_objective": self.best_objective,
            "completed_trials": self.completed_trials,
            "infeasible_trials": self.infeasible_trials,
            "dropped_dimensions": self.dropped_dimensions,
        }


def effective_space(run: RunSettings) -> tuple[JsonObject, dict[str, str]]:
    """Return the dimensions that are searched, and the dropped ones with the reason.

    The parameter budget fixes the ranks of every method, so a search over the rank would compare equal runs.
    """
    space = dict(run.optuna.search_space)
    dropped = {}
    if "lora_rank" in space and not run.model.ranks_are_fixed:
        del space["lora_rank"]
        dropped["lora_rank"] = "the parameter budget fixes the ranks; set run.model.budget_mode=rank to search them"
    return space, dropped


def search(run: RunSettings, objective: Callable[[RunSettings], float], log: TrialLog | None = None) -> SearchResult:
    """Run ``optuna.n_trials`` trials with the TPE sampler, seeded by ``optuna.seed``.

    Finished trials of an earlier attempt are told to a new sampler, which then goes on as the one that made them.

    Args:
        run: settings whose ``optuna`` node says what to do.
        objective: trains with the given settings and returns the metric on held-out data; raises
            :class:`InfeasibleTrialError` where the values cannot make a run.
        log: keeps finished trials.

    Raises:
        UserError: nothing to search, or no trial could be trained.
    """
    space, dropped = effective_space(run)
    for name, reason in dropped.items():
        logger.info("search: dimension %s dropped: %s", name, reason)
    if not space:
        raise UserError("run.optuna.search_space has no dimension to search; set run.optuna.n_trials=0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction=run.optuna.direction, sampler=optuna.samplers.TPESampler(seed=run.optuna.seed)
    )

    log = log or TrialLog(None)
    earlier, finished = log.read(), list[FinishedTrial]()
    for number in range(run.optuna.n_trials):
        trial = study.ask()
        label = f"search: trial {number + 1}/{run.optuna.n_trials}"
        values = {name: _suggest(trial, name, distribution) for name, distribution in space.items()}
        made = earlier[number] if number < len(earlier) and earlier[number].values == values else None
        if made is None:
            earlier = earlier[:number]  # of another version of the sampler
            made = _make_trial(run, values, objective)
            outcome = f"infeasible ({made.reason})" if made.objective is None else f"objective {made.objective:.4f}"
        else:
            outcome = "was made before"
        finished.append(made)
        if len(finished) > len(earlier):
            log.write(finished)
        logger.info("%s %s: %s", label, outcome, _format(values))
        if made.objective is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, made.objective)
    completed = [trial for trial in finished if trial.objective is not None]
    infeasible = len(finished) - len(completed)
    if not completed:
        raise UserError(
            f"run.optuna: none of {infeasible} trials could be trained; narrow run.optuna.search_space to values "
            "that fit the run's length"
        )
    seconds = sum(trial.seconds for trial in finished)
    return SearchResult(study.best_params, study.best_value, len(completed), infeasible, dropped, seconds)


def _make_trial(run: RunSettings, values: JsonObject, objective: Callable[[RunSettings], float]) -> FinishedTrial:
    started = time.perf_counter()
    value, reason = None, ""
    try:
        value = objective(run.with_values(values))
    except InfeasibleTrialError as error:
        reason = str(error)
    return FinishedTrial(values, value, time.perf_counter() - started, reason)


def trial_settings(candidate: RunSettings, run_examples: int, trial_examples: int) -> RunSettings:
    """Return a trial's settings: the search's epochs and seed, and the method's schedule at its share of the steps.

    Args:
        candidate: the run's settings with sampled values.
        run_examples: training examples of the run itself.
        trial_examples: training examples of a trial.

    Raises:
        InfeasibleTrialError: the candidate's schedule does not fit the run, or the trial has a single step.
    """
    # Searched epochs are what a trial has to try; otherwise the search's own budget counts.
    searched = "epochs" in candidate.optuna.search_space
    epochs = candidate.training.epochs if searched else candidate.optuna.epochs
    training = candidate.training.model_copy(update={"epochs": epochs, "seed": candidate.optuna.seed})
    run_steps, trial_steps = candidate.training.total_steps(run_examples), training.total_steps(trial_examples)
    if trial_steps < 2:
        raise InfeasibleTrialError(f"a trial of {trial_steps} step has no room for a warm-up or a schedule")
    try:
        rescaled = get_method(candidate.method).rescale(candidate, run_steps, trial_steps)
    except ValueError as error:
        raise InfeasibleTrialError(str(error)) from None
    return rescaled.model_copy(update={"training": training})


def _suggest(trial: optuna.Trial, name: str, distribution: Any) -> Any:
    if isinstance(distribution, Categorical):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntRange):
        return trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
    return trial.suggest_float(name, distribution.low, distribution.high, log=isinstance(distribution, LogUniform))


def _format(values: JsonMapping) -> str:
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
