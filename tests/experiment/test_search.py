from __future__ import annotations

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.search import InfeasibleTrialError, effective_space, search, trial_settings
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.schema import RunSettings
from tests.helpers.paths import CONFIG_DIR

SPACE = (
    "{learning_rate: {type: loguniform, low: 1.0e-4, high: 1.0e-2}, "
    "weight_decay: {type: uniform, low: 0.0, high: 0.5}, "
    "warmup_steps: {type: int, low: 100, high: 700, step: 100}, batch_size: {type: categorical, choices: [16, 32]}, "
    "lora_rank: {type: categorical, choices: [4, 8]}}"
)


def settings(*arguments: str) -> RunSettings:
    base = ["run=proposed-roberta-base-110M--SST-2-GLUE", "mode=full", f"run.optuna.search_space={SPACE}"]
    return compose_settings([*base, *arguments], CONFIG_DIR, {}).run


def test_all_kinds_are_sampled_within_their_bounds_and_the_best_is_returned(caplog):
    caplog.set_level("INFO", "fwlora")
    seen: list[RunSettings] = []

    def objective(candidate: RunSettings) -> float:
        seen.append(candidate)
        return -abs(candidate.training.learning_rate - 1e-3)

    result = search(settings("run.optuna.n_trials=25"), objective)
    assert len(seen) == result.completed_trials == 25
    rates = [run.training.learning_rate for run in seen]
    assert 1e-4 <= min(rates) < 5e-4 and 2e-3 < max(rates) <= 1e-2
    assert all(0 <= run.training.weight_decay <= 0.5 for run in seen)
    assert {run.fw_lora.warmup_steps for run in seen} <= set(range(100, 701, 100))
    assert {run.training.batch_size for run in seen} == {16, 32}
    assert result.best_objective == max(-abs(rate - 1e-3) for rate in rates)
    best = settings().with_values(result.best_values)
    assert -abs(best.training.learning_rate - 1e-3) == result.best_objective
    assert {run.model.lora.rank for run in seen} == {8} and "lora_rank" in result.dropped_dimensions
    assert (
        sum("dimension lora_rank dropped: the parameter budget fixes the ranks" in line for line in caplog.messages)
        == 1
    )


def test_the_best_is_the_largest_and_a_search_repeats():
    def objective(candidate: RunSettings) -> float:
        return candidate.training.weight_decay

    arguments = ("run.optuna.n_trials=8",)
    first, again = (search(settings(*arguments), objective) for _ in range(2))
    assert first == again
    values: list[float] = []
    search(settings(*arguments), lambda c: values.append(c.training.weight_decay) or values[-1])
    assert first.best_objective == max(values)


def test_rank_is_searched_where_it_leads():
    space, dropped = effective_space(settings("run.model.budget_mode=rank"))
    assert "lora_rank" in space and not dropped


def test_infeasible_values_are_counted_and_all_infeasible_is_an_error(caplog):
    caplog.set_level("INFO", "fwlora")

    def objective(candidate: RunSettings) -> float:
        if candidate.training.batch_size == 32:
            raise InfeasibleTrialError("too large")
        return 1.0

    result = search(settings("run.optuna.n_trials=12"), objective)
    assert result.infeasible_trials > 0 and result.infeasible_trials + result.completed_trials == 12
    assert any("infeasible (too large)" in line for line in caplog.messages)

    def refuse(candidate: RunSettings) -> float:
        raise InfeasibleTrialError("never")

    with pytest.raises(UserError, match="none of 3 trials could be trained"):
        search(settings("run.optuna.n_trials=3"), refuse)


def test_trials_keep_the_warmups_share_of_the_steps():
    run = settings("run.fw_lora.warmup_steps=500", "run.optuna.epochs=1")
    # The run: 3 x 2105 steps; the trial: 250 steps.
    trial = trial_settings(run, 67_349, 8_000)
    assert trial.training.total_steps(8_000) == 250
    assert trial.fw_lora.warmup_steps == round(500 * 250 / 6315) == 20
    assert trial.training.seed == run.optuna.seed != run.training.seed
    tiny = trial_settings(settings("run.fw_lora.warmup_steps=800"), 8_551, 64)
    assert tiny.fw_lora.warmup_steps == 1
    with pytest.raises(InfeasibleTrialError, match="warmup_steps 804 >= the run's 804 steps"):
        trial_settings(settings("run.fw_lora.warmup_steps=804"), 8_551, 8_000)
    with pytest.raises(InfeasibleTrialError, match="no room for a warm-up"):
        trial_settings(run, 67_349, 32)


def test_adaloras_schedule_keeps_its_share_of_the_steps():
    base = ["run=comparative-2-roberta-base-110M--SST-2-GLUE", "mode=full"]
    run = compose_settings([*base, "run.adalora.tinit=200", "run.adalora.tfinal=1000"], CONFIG_DIR, {}).run
    schedule = trial_settings(run, 67_349, 8_000).adalora
    assert (schedule.tinit, schedule.tfinal) == (int(200 * 250 / 6315), int(1000 * 250 / 6315)) == (7, 39)
    tiny = trial_settings(run, 67_349, 96).adalora
    assert tiny.tinit < 3 - tiny.tfinal and 3 - tiny.tfinal >= 2
    with pytest.raises(InfeasibleTrialError, match="leave no step of the run's 804"):
        trial_settings(run, 8_551, 8_000)


def test_nothing_to_search_is_an_error():
    run = settings("run.optuna.n_trials=2")
    only = {"lora_rank": run.optuna.search_space["lora_rank"]}
    only_rank = run.model_copy(update={"optuna": run.optuna.model_copy(update={"search_space": only})})
    with pytest.raises(UserError, match="no dimension to search"):
        search(only_rank, lambda candidate: 0.0)
