from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fwlora.experiment.cli import main
from fwlora.experiment.engine.progress import Progress, ProgressPrinter, format_progress, parse_progress
from fwlora.experiment.errors import UserError
from fwlora.experiment.study.spec import (
    find_repository,
    format_duration,
    known_studies,
    load_study,
    plan_study,
    run_study,
)
from tests.helpers.paths import CONFIG_DIR, REPOSITORY


@pytest.mark.parametrize("name", known_studies(CONFIG_DIR))
def test_every_study_can_be_planned(name):
    study = load_study(name, CONFIG_DIR)
    planned = plan_study(study, CONFIG_DIR, {})
    ids = [run.run_id for run in planned]
    assert len(set(ids)) == len(ids) == len(study.runs) * len(study.seeds or [None])


def test_quickstart_compares_the_three_methods_with_a_short_warmup():
    from fwlora.experiment.data.acceptability import generate_task
    from fwlora.experiment.settings.hydra_arguments import compose_settings

    planned = plan_study(load_study("quickstart", CONFIG_DIR), CONFIG_DIR, {})
    runs = [compose_settings(run.arguments, CONFIG_DIR, {}).run for run in planned]
    assert [run.method for run in runs] == ["baseline_lora", "adalora", "proposed_fw_lora"]
    shared = [run.model_dump(include={"model", "dataset", "training", "optuna"}) for run in runs]
    assert shared[0] == shared[1] == shared[2]
    steps = runs[2].training.total_steps(len(generate_task()["train"]))
    assert 0 < runs[2].fw_lora.warmup_steps <= 0.2 * steps


def fake_repository(tmp_path: Path, main_code: str, evaluate_code: str = "print('table')") -> Path:
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text(main_code)
    (tmp_path / "src" / "evaluate.py").write_text(evaluate_code)
    (tmp_path / "config" / "study" / "mine.yaml").write_text(
        "results_dir: out\nruns:\n- comparative-1-roberta-base-110M--CoLA-GLUE\n"
        "- {run: proposed-roberta-base-110M--CoLA-GLUE, overrides: [run.fw_lora.warmup_steps=7]}\nseeds: [1, 2]\n"
        "overrides: [run.optuna.n_trials=0, wandb.mode=offline]\n"
    )
    return tmp_path


RECORD = (
    "import json, sys; open('calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n'); print('step 1/2  epoch 1  loss 0.5')"
)


def test_a_study_runs_everything_in_order_then_evaluates(tmp_path, monkeypatch):
    repository = fake_repository(tmp_path, RECORD, RECORD)
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {}, ["wandb.mode=disabled"])
    out = io.StringIO()
    with (repository / "src" / "evaluate.py").open("a") as program:
        program.write("\nprint('UNDECIDED  a claim\\nout/a/a_curve.pdf\\nout/comparison/report.html')")
    assert run_study(planned, repository, Console(file=out, width=200)) == 0
    said = out.getvalue().splitlines()[-3:]
    assert said[0] == "UNDECIDED  a claim"
    assert said[1].startswith("2 files written, 1 of them figures: ")
    assert said[2] == f"report: {repository / 'out' / 'comparison' / 'report.html'}"
    calls = [json.loads(line) for line in (repository / "calls").read_text().splitlines()]
    lora, proposed = (f"{m}-roberta-base-110M--CoLA-GLUE" for m in ("comparative-1", "proposed"))
    ids = [f"{run}-s{seed}" for seed in (1, 2) for run in (lora, proposed)]
    assert calls[:4] == [run.arguments for run in planned] and [run.run_id for run in planned] == ids
    assert "run.fw_lora.warmup_steps=7" in calls[1] and "run.fw_lora.warmup_steps=7" not in " ".join(calls[0])
    assert all("wandb.mode=disabled" in call and "wandb.mode=offline" not in call for call in calls[:4])
    assert calls[4] == ["results_dir=out", f"run_ids={json.dumps(ids)}"]
    assert "[4/4] step 1/2  epoch 1  loss 0.5" in out.getvalue()


def test_a_failing_run_ends_the_study_with_its_exit_code(tmp_path):
    repository = fake_repository(tmp_path, RECORD + "; sys.exit(7 if 'proposed' in sys.argv[1] else 0)")
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    for terminal in (False, True):
        out = io.StringIO()
        assert run_study(planned, repository, Console(file=out, width=200, force_terminal=terminal)) == 7
        assert "proposed-roberta-base-110M--CoLA-GLUE-s1 failed with exit code 7" in out.getvalue()
    calls = (repository / "calls").read_text().splitlines()
    assert len(calls) == 4, "nothing runs after the failure"


def test_terminal_shows_a_bar_per_run(tmp_path):
    repository = fake_repository(tmp_path, RECORD)
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    out = io.StringIO()
    assert run_study(planned, repository, Console(file=out, width=160, force_terminal=True)) == 0
    assert "1/2" in out.getvalue() and "done" in out.getvalue()


def test_mistakes(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="study 'x' is unknown; config/study has minilm-cola, quickstart"):
        load_study("x", CONFIG_DIR)
    (tmp_path / "repo").mkdir()
    repository = fake_repository(tmp_path / "repo", RECORD)
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
    repository = fake_repository(tmp_path, RECORD)
    study = load_study("mine", repository / "config").model_copy(update={"seeds": [2, 2]})
    with pytest.raises(UserError, match="is planned 2 times"):
        plan_study(study, repository / "config", {})


def test_checkout_is_found_from_below():
    assert find_repository(REPOSITORY / "tests") == REPOSITORY


@pytest.mark.parametrize("progress", [Progress(40, 300, 1, 0.6123, True), Progress(1, 2, 1, float("nan"), False)])
def test_progress_lines_are_read_back(progress):
    assert str(parse_progress(format_progress(progress))) == str(progress)
    assert parse_progress("run x: step 1/2") is None


def test_progress_is_logged_now_and_then_and_at_the_end(caplog):
    caplog.set_level("INFO", "fwlora")
    ticks = iter([0.0, 1.0, 2.5, 3.0])
    printer = ProgressPrinter(lambda: next(ticks))
    for step in (1, 2, 3, 4):
        printer(Progress(step, 4, 1, 0.5, False))
    assert [line.split()[1] for line in caplog.messages] == ["1/4", "3/4", "4/4"]


def test_durations():
    assert format_duration(75.2) == "1 min 15 s" and format_duration(59.4) == "59 s"
