"""What today's pipelines ask for: modes, verdicts, the second folder of run files, ids as parts of names."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.pipeline_contract import (
    VALIDATIONS,
    announce_verdict,
    complete_verdict,
    is_verdict,
    mirror_run_files,
    watch,
)
from fwlora.experiment.settings.hydra_arguments import compose_settings, known_run_ids, usage
from fwlora.experiment.settings.modes import Mode, get_mode, register_mode
from fwlora.experiment.tracking import NullTracker
from tests.helpers.paths import CONFIG_DIR

LORA = "comparative-1-minilm-L6--acceptability"
PROPOSED = "proposed-minilm-L6--acceptability"
SUMMARY = {"primary_metric": "eval_accuracy", "final_eval_accuracy": 0.6, "training_time_s": 1.5}


def make_rows(losses, accuracies=(0.5, 0.6)):
    rows = [{"global_step": step, "train_loss": loss} for step, loss in enumerate(losses, 1)]
    return rows + [{"global_step": len(rows), "eval_accuracy": accuracy} for accuracy in accuracies]


@pytest.mark.parametrize(
    ("mode", "rows", "changes", "outcome"),
    [
        ("sanity", make_rows([0.7, 0.6, 0.6, 0.6, 0.7]), {}, "PASS"),
        ("sanity", make_rows([0.7, 0.6, 0.6, 0.6, 0.71]), {}, "FAIL reason=loss_did_not_fall"),
        # Means over a fifth of the steps at each end decide, not single steps.
        ("sanity", make_rows([0.6, 0.8, *[0.7] * 6, 0.5, 0.7]), {}, "PASS"),
        ("sanity", make_rows([0.8, 0.6, *[0.7] * 6, 0.8, 0.65]), {}, "FAIL reason=loss_did_not_fall"),
        ("sanity", make_rows([0.7, 0.6, 0.6, 0.6]), {}, "FAIL reason=too_few_steps"),
        ("sanity", make_rows([0.7] * 5, (0.0, 0.0)), {}, "FAIL reason=accuracy_is_zero"),
        ("sanity", make_rows([0.7] * 5, (0.0, 0.1)), {}, "PASS"),
        ("sanity", make_rows([0.7] * 5, ()), {}, "PASS"),
        ("sanity", make_rows([0.7, 0.7, math.nan, 0.7, 0.6]), {}, "FAIL reason=not_finite"),
        ("sanity", make_rows([0.7] * 5), {"training_time_s": math.inf}, "FAIL reason=not_finite"),
        ("sanity", [], {}, "FAIL reason=missing_metrics"),
        ("sanity", make_rows([0.7] * 5), {"final_eval_accuracy": None}, "FAIL reason=missing_metrics"),
        ("sanity", make_rows([0.7] * 5), {"primary_metric": None}, "FAIL reason=missing_metrics"),
        ("pilot", make_rows([0.7] * 9 + [0.6]), {}, "PASS"),
        ("pilot", make_rows([0.7] * 8 + [0.6]), {}, "FAIL reason=too_few_steps"),
        ("pilot", make_rows([0.7] * 10), {}, "FAIL reason=loss_did_not_fall"),
        ("pilot", make_rows([0.7] * 9 + [0.6]), {"final_eval_accuracy": 0.0}, "FAIL reason=primary_metric_is_zero"),
    ],
)
def test_a_run_passes_or_the_first_reason_is_named(mode, rows, changes, outcome):
    verdict = VALIDATIONS[mode].judge(rows, SUMMARY | changes)
    *_, last = verdict.lines()
    assert last == f"{mode.upper()}_VALIDATION: {outcome}"


def test_summaries_hold_what_was_judged_as_json():
    losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    for mode, own in (
        ("sanity", {"accuracy_min": 0.5, "accuracy_max": 0.6}),
        ("pilot", {"primary_metric": "eval_accuracy", "primary_metric_value": 0.6}),
    ):
        first, _ = VALIDATIONS[mode].judge(make_rows(losses), SUMMARY).lines()
        prefix, _, text = first.partition(": ")
        assert prefix == f"{mode.upper()}_VALIDATION_SUMMARY"
        assert json.loads(text) == {"steps": 10, "loss_start": 0.95, "loss_end": 0.15, **own}
    broken, _ = VALIDATIONS["sanity"].judge(make_rows([math.nan] * 5), SUMMARY).lines()
    assert json.loads(broken.partition(": ")[2])["loss_end"] is None, "NaN is no JSON"


def test_what_a_run_records_is_what_is_judged(capsys):
    plain = NullTracker()
    assert watch(plain, "full") is plain
    announce_verdict(plain)
    assert capsys.readouterr().out == ""
    tracker = watch(NullTracker(), "sanity")
    for row in make_rows([0.7, 0.6, 0.6, 0.6, 0.6]):
        tracker.log(row)
    tracker.set_summary(SUMMARY)
    announce_verdict(tracker)
    assert capsys.readouterr().out.endswith("\nSANITY_VALIDATION: PASS\n")
    tracker.set_summary({"final_eval_accuracy": math.nan})
    with pytest.raises(SystemExit) as ended:
        announce_verdict(tracker)
    assert ended.value.code == 3 and "FAIL reason=not_finite" in capsys.readouterr().out


def test_a_run_that_died_before_its_verdict_has_none_but_that_of_a_run_without_metrics():
    assert complete_verdict([], "full") == complete_verdict([], "trial") == []
    assert complete_verdict(["x"], "sanity") == ["x"]
    *_, verdict = complete_verdict([], "pilot")
    assert verdict == "PILOT_VALIDATION: FAIL reason=missing_metrics"
    assert is_verdict(verdict, "pilot") and not is_verdict(verdict, "full") and not is_verdict("step 1/2", "pilot")


def test_help_names_the_modes_and_holds_no_verdict():
    shown = usage("src.main", CONFIG_DIR)
    assert all(f"\n    {name}" in shown for name in ("trial", "full", "sanity", "pilot"))
    assert "VALIDATION" not in shown


def compose(mode, *arguments, run=LORA, environment=None):
    return compose_settings([f"run={run}", f"mode={mode}", *arguments], CONFIG_DIR, environment or {})


def test_sanity_is_one_batch_again_and_again_and_recorded():
    settings = compose("sanity", "run.optuna.n_trials=5", run=PROPOSED)
    run = settings.run
    assert (run.dataset.train_examples, run.dataset.eval_examples) == (run.training.batch_size,) * 2
    assert run.training.total_steps(run.dataset.train_examples) == 20
    assert (run.optuna.n_trials, run.fw_lora.warmup_steps, settings.wandb.mode) == (0, 1, "online")


@pytest.mark.parametrize(
    ("epochs", "trials", "expected"), [(3, 20, (3, 3)), (2, 1, (2, 1)), (40, 0, (10, 0)), (13, 3, (4, 3))]
)
def test_pilot_is_a_quarter_of_the_epochs_three_at_least(epochs, trials, expected):
    settings = compose("pilot", f"run.training.epochs={epochs}", f"run.optuna.n_trials={trials}")
    run = get_mode("pilot").fit(settings, 2200).run
    assert (run.training.epochs, run.optuna.n_trials) == expected


def test_pilot_keeps_the_share_of_the_warm_up():
    settings = compose("pilot", "run.training.epochs=40", "run.fw_lora.warmup_steps=400", run=PROPOSED)
    fitted = get_mode("pilot").fit(settings, 2200).run
    full_steps = settings.run.training.total_steps(2200)
    assert fitted.fw_lora.warmup_steps == round(400 * fitted.training.total_steps(2200) / full_steps) == 100
    beyond = compose("pilot", "run.training.epochs=40", "run.fw_lora.warmup_steps=9000", run=PROPOSED)
    with pytest.raises(UserError, match="mode=pilot of 10 epochs: warmup_steps 9000"):
        get_mode("pilot").fit(beyond, 2200)


@pytest.mark.parametrize(
    ("mode", "arguments", "environment", "project"),
    [
        ("full", [], {}, "251106-test"),
        ("sanity", [], {}, "251106-test-sanity"),
        ("pilot", [], {"WANDB_PROJECT": "study"}, "study-pilot"),
        ("pilot", [], {"WANDB_PROJECT": "study-pilot"}, "study-pilot"),
        ("pilot", ["wandb.project=mine"], {"WANDB_PROJECT": "study"}, "mine"),
        ("full", [], {"WANDB_PROJECT": "study"}, "study"),
    ],
)
def test_runs_of_these_modes_have_projects_of_their_own(mode, arguments, environment, project):
    assert compose(mode, *arguments, environment=environment).wandb.project == project


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        (["results_dir=given"], {"RESULTS_DIR": "mounted"}, "given"),
        (["results_dir="], {"RESULTS_DIR": "mounted"}, "mounted"),
        ([], {"RESULTS_DIR": "mounted"}, "mounted"),
        (["results_dir="], {"RESULTS_DIR": ""}, ".research/results"),
    ],
)
def test_an_empty_results_dir_is_the_variable_or_the_default(arguments, environment, folder):
    assert compose("full", *arguments, environment=environment).results_dir == folder


def test_the_folder_that_pipelines_list_holds_the_run_files():
    names = [sorted(path.name for path in (CONFIG_DIR / folder).iterdir()) for folder in ("run", "runs")]
    assert names[0] == names[1], "run: fwlora mirror-runs"
    for name in names[0]:
        copy, original = CONFIG_DIR / "run" / name, CONFIG_DIR / "runs" / name
        assert not copy.is_symlink() and copy.read_bytes() == original.read_bytes(), "run: fwlora mirror-runs"


def test_run_files_are_mirrored_and_an_edited_copy_is_refused(tmp_path):
    config = tmp_path / "config"
    shutil.copytree(CONFIG_DIR, config)
    assert mirror_run_files(config) == []
    copy = config / "run" / f"{LORA}.yaml"
    copy.write_text(copy.read_text().replace("epochs: 3", "epochs: 9"))
    (config / "run" / "stray.yaml").write_text("run_id: stray\n")
    with pytest.raises(UserError, match=rf"config/run/{LORA}\.yaml differs from config/runs/.* fwlora mirror-runs"):
        compose_settings([f"run={LORA}", "mode=full"], config, {})
    assert sorted(path.name for path in mirror_run_files(config)) == [copy.name, "stray.yaml"]
    assert compose_settings([f"run={LORA}", "mode=full"], config, {}).run.training.epochs == 3
    assert not (config / "run" / "stray.yaml").exists()
    shutil.rmtree(config / "run")
    assert compose_settings([f"run={LORA}", "mode=full"], config, {}).run.run_id == LORA, "the copy is no input"


def is_branch(name):
    return subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["a..b", "a.", "a.lock", ".a", "-a", "a b", "a'b", "a~b", "a^b", "a{b", "$a", "ä"])
def test_ids_that_cannot_be_parts_of_names_are_refused(tmp_path, name):
    config = tmp_path / "config"
    shutil.copytree(CONFIG_DIR, config)
    text = (config / "runs" / f"{LORA}.yaml").read_text()
    (config / "runs" / f"{name}.yaml").write_text(text.replace(f"run_id: {LORA}", f"run_id: '{name}'", 1))
    with pytest.raises(UserError, match="rename the file"):
        compose_settings([f"run={name}", "mode=full"], config, {})


def test_every_id_names_a_branch_an_artifact_and_a_word_of_a_shell():
    for run_id in known_run_ids(CONFIG_DIR):
        assert is_branch(f"main-{run_id}") and not set(run_id) & set("\":<>|*?/\\ '$`(){}&;~")


def test_ids_stay_apart_where_a_service_keeps_lower_case_letters_and_digits_alone():
    run_ids = known_run_ids(CONFIG_DIR)
    assert len({re.sub("[^a-z0-9_]", "_", run_id.lower()) for run_id in run_ids}) == len(run_ids)


def test_a_mode_of_ones_own_needs_a_name_of_its_own():
    with pytest.raises(ValueError, match="'full' is taken by another mode"):
        register_mode(Mode("full", "something else", lambda settings: settings))
