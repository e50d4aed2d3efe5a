from __future__ import annotations

import io
import json

from rich.console import Console

from fwlora.experiment.paths import find_repository
from fwlora.experiment.study.display import format_duration
from fwlora.experiment.study.execution import run_study
from fwlora.experiment.study.spec import load_study, plan_study
from tests.helpers.paths import REPOSITORY
from tests.helpers.study_repository import RECORD, make_study_repository


def test_a_study_runs_everything_in_order_then_evaluates(tmp_path, monkeypatch):
    repository = make_study_repository(tmp_path, RECORD, RECORD)
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {}, ["wandb.mode=disabled"])
    out = io.StringIO()
    with (repository / "src" / "evaluate.py").open("a") as program:
        program.write("\nprint('UNDECIDED  a claim\\nout/a/a_curve.pdf\\nout/comparison/report/report.html')")
    assert run_study(planned, repository, Console(file=out, width=200)) == 0
    said = out.getvalue().splitlines()[-3:]
    assert said[0] == "UNDECIDED  a claim"
    assert said[1].startswith("2 files written, 1 of them figures: ")
    assert said[2] == f"report: {repository / 'out' / 'comparison' / 'report' / 'report.html'}"
    calls = [json.loads(line) for line in (repository / "calls").read_text().splitlines()]
    lora, proposed = (f"{m}-roberta-base-110M--CoLA-GLUE" for m in ("comparative-1", "proposed"))
    ids = [f"{run}-s{seed}" for seed in (1, 2) for run in (lora, proposed)]
    assert calls[:4] == [run.arguments for run in planned] and [run.run_id for run in planned] == ids
    assert "run.fw_lora.warmup_steps=7" in calls[1] and "run.fw_lora.warmup_steps=7" not in " ".join(calls[0])
    assert all("wandb.mode=disabled" in call and "wandb.mode=offline" not in call for call in calls[:4])
    assert calls[4] == ["results_dir=out", f"run_ids={json.dumps(ids)}"]
    assert "[4/4] step 1/2  epoch 1  loss 0.5" in out.getvalue()


def test_a_failing_run_ends_the_study_with_its_exit_code(tmp_path):
    repository = make_study_repository(tmp_path, RECORD + "; sys.exit(7 if 'proposed' in sys.argv[1] else 0)")
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    for terminal in (False, True):
        out = io.StringIO()
        assert run_study(planned, repository, Console(file=out, width=200, force_terminal=terminal)) == 7
        assert "proposed-roberta-base-110M--CoLA-GLUE-s1 failed with exit code 7" in out.getvalue()
    calls = (repository / "calls").read_text().splitlines()
    assert len(calls) == 4, "nothing runs after the failure"


def test_terminal_shows_a_bar_per_run(tmp_path):
    repository = make_study_repository(tmp_path, RECORD)
    planned = plan_study(load_study("mine", repository / "config"), repository / "config", {})
    out = io.StringIO()
    assert run_study(planned, repository, Console(file=out, width=160, force_terminal=True)) == 0
    assert "1/2" in out.getvalue() and "done" in out.getvalue()


def test_checkout_is_found_from_below():
    assert find_repository(REPOSITORY / "tests") == REPOSITORY


def test_durations():
    assert format_duration(75.2) == "1 min 15 s" and format_duration(59.4) == "59 s"
