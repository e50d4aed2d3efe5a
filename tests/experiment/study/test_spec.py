from __future__ import annotations

import pytest

from fwlora.experiment.cli import main
from fwlora.experiment.errors import UserError
from fwlora.experiment.paths import find_repository
from fwlora.experiment.study.spec import known_studies, load_study, plan_evaluations, plan_study
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.study_repository import RECORD, make_study_repository


@pytest.mark.parametrize("name", known_studies(CONFIG_DIR))
def test_every_study_can_be_planned(name):
    study = load_study(name, CONFIG_DIR)
    planned = plan_study(study, CONFIG_DIR, {})
    ids = [run.run_id for run in planned]
    assert len(set(ids)) == len(ids) == len(study.runs) * len(study.seeds or [None])


def test_quickstart_compares_the_methods_and_the_control_over_three_seeds_with_a_short_warmup():
    from fwlora.experiment.data.acceptability import generate_task
    from fwlora.experiment.settings.hydra_arguments import compose_settings

    planned = plan_study(load_study("quickstart", CONFIG_DIR), CONFIG_DIR, {})
    runs = [compose_settings(run.arguments, CONFIG_DIR, {}).run for run in planned]
    arms = ["baseline_lora", "adalora", "proposed_fw_lora", "proposed_fw_lora"]
    assert [(run.method, run.training.seed) for run in runs] == [(arm, seed) for seed in (1, 2, 3) for arm in arms]
    shared = [run.model_dump(include={"model", "dataset", "training", "optuna"}) for run in runs]
    for run in shared:
        del run["training"]["seed"]
    assert all(run == shared[0] for run in shared)
    control, proposed = (run.fw_lora for run in runs[2:4])
    assert control.importance == "none" and proposed.importance == "sum"
    steps = runs[2].training.total_steps(len(generate_task()["train"]))
    assert 0 < proposed.warmup_steps == control.warmup_steps <= 0.2 * steps
    assert control.model_copy(update={"importance": "sum"}) == proposed


def test_mistakes(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="study 'x' is unknown; config/study has minilm-cola, quickstart"):
        load_study("x", CONFIG_DIR)
    (tmp_path / "repo").mkdir()
    repository = make_study_repository(tmp_path / "repo", RECORD)
    (repository / "config" / "study" / "bad.yaml").write_text("runs: []\nresults: out\n")
    with pytest.raises(UserError, match="3 problems") as caught:
        load_study("bad", repository / "config")
    assert all(key in str(caught.value) for key in ("results_dir", "runs", "results"))
    (repository / "config" / "study" / "bad2.yaml").write_text("results_dir: a\nruns: [nope, worse]\n")
    with pytest.raises(UserError, match="2 problems") as caught:
        plan_study(load_study("bad2", repository / "config"), repository / "config", {})
    assert "run=nope" in str(caught.value) and "run=worse" in str(caught.value)
    with pytest.raises(UserError, match="not inside a checkout"):
        find_repository(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["study", "quickstart"])
    assert stopped.value.code == 2 and "not inside a checkout" in capsys.readouterr().err


def test_a_run_planned_twice_is_refused(tmp_path):
    repository = make_study_repository(tmp_path, RECORD)
    study = load_study("mine", repository / "config").model_copy(update={"seeds": [2, 2]})
    with pytest.raises(UserError, match="is planned 2 times"):
        plan_study(study, repository / "config", {})


def plan(tmp_path, *overrides):
    repository = make_study_repository(tmp_path, RECORD)
    return plan_study(load_study("mine", repository / "config"), repository / "config", {}, overrides)


def test_each_folder_of_results_gets_its_evaluation(tmp_path):
    repository = make_study_repository(tmp_path, RECORD)
    path = repository / "config" / "study" / "mine.yaml"
    path.write_text(
        path.read_text().replace("run.fw_lora.warmup_steps=7", "results_dir=elsewhere").replace("1, 2", "1")
    )
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    assert [run.results_dir for run in planned] == ["out", "elsewhere"]
    assert [evaluation.results_dir for evaluation in plan_evaluations(planned)] == ["out", "elsewhere"]
    assert planned[1].log.as_posix() == f"elsewhere/{planned[1].run_id}/logs/full.log"


def test_trial_runs_have_their_own_log_and_no_evaluation(tmp_path):
    planned = plan(tmp_path, "mode=trial")
    assert {run.log.name for run in planned} == {"trial.log"}
    assert plan_evaluations(planned) == []


def test_a_project_given_to_the_runs_is_given_to_the_evaluation(tmp_path):
    (evaluation,) = plan_evaluations(plan(tmp_path, "wandb.project=other", "wandb.entity=team"))
    assert {"wandb.project=other", "wandb.entity=team"} <= set(evaluation.arguments)


def test_one_folder_with_records_of_two_projects_is_refused(tmp_path):
    repository = make_study_repository(tmp_path, RECORD)
    path = repository / "config" / "study" / "mine.yaml"
    path.write_text(path.read_text().replace("run.fw_lora.warmup_steps=7", "wandb.project=other"))
    with pytest.raises(UserError, match="runs in out are recorded in different places") as caught:
        plan_study(load_study("mine", repository / "config"), repository / "config", {})
    assert "wandb.project=other" in str(caught.value)
