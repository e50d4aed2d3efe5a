"""The contract's commands as a pipeline types them: subprocesses, exit codes, logs, files."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.paths import REPOSITORY

PROPOSED = "proposed-roberta-base-110M--CoLA-GLUE"
LORA = "comparative-1-roberta-base-110M--CoLA-GLUE"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-u", "-m", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=variables)


@pytest.fixture
def tiny(tiny_roberta, tiny_glue) -> list[str]:
    return [
        f"run.model.pretrained_id={tiny_roberta}", f"run.dataset.name={tiny_glue}",
        "run.model.parameter_budget_percent=5.0",
    ]  # fmt: skip


def test_trial_runs_train_keeps_its_log_and_writes_nothing_else(tiny, tmp_path):
    results = tmp_path / "results = (1)"
    done = python("src.main", f"run={PROPOSED}-s3", f"results_dir={results}", "mode=trial", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    written = [path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()]
    assert written == [f"{PROPOSED}-s3/logs/trial.log"]
    log = (results / written[0]).read_text()
    assert "src.train" in log.splitlines()[0] and log.split("\n", 1)[1] == done.stdout
    assert "seed 3, mode trial" in done.stdout and "step 2/2" in done.stdout
    assert not any(line.startswith(("{", "[")) for line in done.stdout.splitlines()), "no JSON on stdout"
    assert "Warning" not in done.stdout + done.stderr and done.stderr == ""


def test_full_offline_run_then_evaluation(tiny, tmp_path):
    run_ids: list[str] = []
    typed: dict[str, str] = {}
    for run_id, more in ((LORA, []), (PROPOSED, ["run.fw_lora.warmup_steps=4"])):
        command = [
            "src.main", f"run={run_id}", f"results_dir={tmp_path}", "mode=full", "run.training.seed=2",
            "run.optuna.n_trials=0", "run.training.epochs=1", "wandb.mode=offline", *more, *tiny,
        ]  # fmt: skip
        done = python(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        run_ids.append(f"{run_id}-s2")
        typed[run_ids[-1]] = shlex.join(["python", "-u", "-m", *command])
    before = {path.relative_to(tmp_path).parts[1] for path in tmp_path.rglob("*") if path.is_file()}
    assert before == {"logs", "wandb", "adapter", "attempts"}
    assert not list(tmp_path.rglob("*.pdf")) + list(tmp_path.rglob("metrics.json")), "training evaluates nothing"
    done = python("src.evaluate", f"results_dir={tmp_path}", f"run_ids={json.dumps(run_ids)}")
    assert done.returncode == 0, done.stdout + done.stderr
    paths = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert all(path.is_file() for path in paths)
    names = [path.name for path in paths if path.suffix == ".pdf"]
    assert len(names) == len(set(names)) and f"{LORA}-s2_learning_curve.pdf" in names
    aggregated = json.loads((tmp_path / "comparison" / "aggregated_metrics.json").read_text())
    assert aggregated["primary_metric"] == "eval_matthews_correlation"
    for run_id in run_ids:
        metrics = json.loads((tmp_path / run_id / "metrics.json").read_text())
        assert metrics["resolved"]["command"] == typed[run_id]
        recorded = aggregated["metrics"]["eval_matthews_correlation"][run_id]
        assert recorded == metrics["summary"]["final_eval_matthews_correlation"]
    (cell,) = json.loads((tmp_path / "comparison" / "report" / "statistics.json").read_text())["cells"]
    assert [(method["method"], method["seeds"]) for method in cell["methods"]] == [
        ("LoRA", [2]),
        ("FW-LoRA", [2]),
    ]


TWO_MISTAKES = [f"run={PROPOSED}", "mode=trial", "run.training.epoch=1", "run.training.seed=x"]


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("src.main", [f"run={PROPOSED}"], "mode is missing"),
        ("src.main", ["run=unknown", "mode=trial"], "unknown run id"),
        ("src.main", ["run=a/b", "mode=trial"], "no path separator"),
        ("src.main", TWO_MISTAKES, "2 problems"),
        ("src.train", TWO_MISTAKES, "2 problems"),
    ],
)
def test_bad_arguments_end_in_one_message_and_exit_code_2(program, arguments, expected, tmp_path):
    done = python(program, f"results_dir={tmp_path / 'results'}", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and expected in done.stderr
    assert "Traceback" not in done.stderr + done.stdout and not (tmp_path / "results").exists()


def test_a_failing_child_decides_the_exit_code_and_its_message_is_in_the_log(tiny, tmp_path):
    broken = [item for item in tiny if "pretrained_id" not in item]
    done = python(
        "src.main", f"run={LORA}", f"results_dir={tmp_path}", "mode=trial", "run.model.pretrained_id=no/such", *broken
    )
    assert done.returncode == 2
    message = "error: run.model.pretrained_id = 'no/such' cannot be fetched"
    assert message in done.stdout and message in (tmp_path / LORA / "logs" / "trial.log").read_text()


@pytest.mark.parametrize(
    ("mode", "last"), [("full", None), ("sanity", "SANITY_VALIDATION: FAIL reason=missing_metrics")]
)
def test_a_crash_of_the_child_is_not_lost(tmp_path, tiny, mode, last):
    command = [
        sys.executable, "-u", "-m", "src.main", f"run={LORA}", f"results_dir={tmp_path}", f"mode={mode}",
        "wandb.mode=disabled", "run.optuna.n_trials=0", *tiny,
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as started:
        printed = started.stdout.readline()
        (child,) = psutil.Process(started.pid).children()
        child.kill()
        printed += started.stdout.read()
    assert started.returncode == 128 + signal.SIGKILL
    verdicts = [line for line in printed.splitlines() if line.startswith("SANITY_VALIDATION: ")]
    assert verdicts == ([] if last is None else [last]) and printed.endswith(f"{last or ''}\n")


def test_unwritable_results_dir(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    done = python("src.main", f"run={LORA}", f"results_dir={tmp_path / 'file'}", "mode=trial", *tiny)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_of_the_parent_alone_reaches_the_child(tmp_path, tiny):
    command = [
        sys.executable, "-u", "-m", "src.main", f"run={LORA}", f"results_dir={tmp_path}", "mode=full",
        "wandb.mode=disabled", "run.optuna.n_trials=0", "run.training.epochs=10000", *tiny,
    ]  # fmt: skip
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # What ignores interrupts, as pytest's own worker processes do, hands that on to its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=REPOSITORY, **output) as started:
        signal.signal(signal.SIGINT, before)
        for line in started.stdout:
            if line.startswith("step "):
                break
        started.send_signal(signal.SIGINT)
        asked = time.monotonic()
        rest = started.stdout.read()
        assert started.wait(timeout=60) == 130 and time.monotonic() - asked < 10
        assert rest.endswith("the same command continues the run\ninterrupted\n") and "Traceback" not in rest


WAITS = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError
"""


@pytest.mark.parametrize(("module", "library"), [("src.main", "hydra"), ("src.train", "hydra"), ("src.train", "torch")])
def test_an_interrupt_while_libraries_are_imported_is_one_word(tmp_path, module, library):
    """The library waits while it is imported; some take such an interrupt for an import that failed."""
    (tmp_path / f"{library}.py").write_text(WAITS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-m", module, f"run={LORA}"], cwd=REPOSITORY, env=environment, **output
    ) as started:
        signal.signal(signal.SIGINT, before)
        assert started.stdout.readline() == "importing\n"
        started.send_signal(signal.SIGINT)
        _, told = started.communicate(timeout=30)
    assert (started.returncode, told) == (130, "interrupted\n")


def test_multirun_takes_runs(tmp_path, tiny):
    done = python(
        "src.main", "--multirun", f"run={LORA},{PROPOSED}", "run.training.seed=2", f"results_dir={tmp_path}",
        "mode=trial", *tiny,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.parents[1].name for path in tmp_path.glob("*/logs/trial.log")) == sorted(
        f"{run_id}-s2" for run_id in (LORA, PROPOSED)
    )


def test_help_names_the_known_runs():
    done = python("src.main", "--help")
    assert done.returncode == 0 and PROPOSED in done.stdout and "results_dir" in done.stdout


def test_evaluation_of_what_is_not_there(tmp_path):
    done = python("src.evaluate", f"results_dir={tmp_path}", f'run_ids=["{LORA}"]', "source=files")
    assert done.returncode == 2 and LORA in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
