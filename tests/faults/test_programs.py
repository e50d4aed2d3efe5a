"""Whole programs that are stopped, killed or robbed of what they need, and continued by the same command."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fwlora.experiment.errors import EXIT_HELD, EXIT_UNRECORDED
from fwlora.experiment.programs import WarmServer
from fwlora.experiment.stopping import SIGNALS
from tests.helpers.interrupted_runs import list_methods
from tests.helpers.paths import REPOSITORY
from tests.helpers.stopped_programs import TinyRun, list_programs, read_until, wait_for_none
from tests.helpers.wandb_server import API_KEY

METHODS = list_methods(warmup_steps=40)


@pytest.fixture(scope="module")
def warm() -> WarmServer:
    return WarmServer()


@pytest.fixture
def make_run(warm, tiny_roberta, tiny_glue, tmp_path) -> Callable[..., TinyRun]:
    def make(
        method: str,
        folder: str = "results",
        *more: str,
        epochs: int = 30,
        environment: dict[str, str] | None = None,
    ) -> TinyRun:
        run_id, own = METHODS[method]
        arguments = [
            f"run.model.pretrained_id={tiny_roberta}", f"run.dataset.name={tiny_glue}",
            "run.model.parameter_budget_percent=5.0", "run.optuna.n_trials=0", f"run.training.epochs={epochs}",
            *own, *more,
        ]  # fmt: skip
        if not any(argument.startswith("wandb.mode") for argument in more):
            arguments.append("wandb.mode=offline")
        return TinyRun(warm, tmp_path / folder, run_id, arguments, environment)

    return make


# Those that pytest's own workers do not ignore.
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in SIGNALS
            if number not in (signal.SIGTERM, signal.SIGINT)
        ),
    ],
)
def test_a_signal_stops_a_run_with_a_checkpoint_and_the_same_command_continues_it(make_run, number):
    whole, run = make_run("FW-LoRA, sketch", "whole"), make_run("FW-LoRA, sketch")
    whole.complete()
    with run.start() as program:
        read_until(program, "step ")
        asked = time.monotonic()
        program.send_signal(number)
        printed = program.stdout.read().splitlines()
    assert time.monotonic() - asked < 10
    assert program.returncode == 128 + number
    assert printed[-2:] == ["the same command continues the run", f"stopped by {number.name}"]
    assert wait_for_none(run.results) == []
    (attempt,) = run.attempts()
    assert (attempt["outcome"], attempt["reason"]) == ("stopped", f"stopped by {number.name}")
    printed = run.complete()
    assert any(line.startswith("attempt 2: continues attempt 1 from step ") for line in printed)
    assert run.found() == whole.found()


@pytest.mark.parametrize(
    "line", ["W&B", *(pytest.param(line, marks=pytest.mark.slow) for line in ("run ", "parameters: "))]
)
def test_a_signal_before_the_first_step_stops_a_run(make_run, line):
    run = make_run("LoRA")
    with run.start() as program:
        read_until(program, line)
        asked = time.monotonic()
        program.send_signal(signal.SIGTERM)
        printed = program.stdout.read()
    assert (program.returncode, time.monotonic() - asked < 10) == (143, True), printed
    assert "Traceback" not in printed
    assert wait_for_none(run.results) == []


def test_a_second_signal_ends_a_run_at_once(make_run):
    run = make_run("LoRA", epochs=3000)
    with run.start() as program:
        read_until(program, "step ")
        (child,) = psutil.Process(program.pid).children()
        child.suspend()  # a step that lasts
        program.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        program.send_signal(signal.SIGTERM)
        child.resume()
        program.stdout.read()
    assert program.returncode == 143


def kill_and_continue(run: TinyRun, delay_s: float) -> bool:
    """Kill the child of a run after a while, and W&B's service with it; return whether it was still running."""
    with run.start() as program:
        time.sleep(delay_s)
        killed = False
        for process in [*psutil.Process(program.pid).children(recursive=True)][::-1]:
            process.kill()
            killed = True
        program.stdout.read()
    assert program.returncode in (0, 137)
    return killed and program.returncode == 137


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sigkill_at_random_moments_changes_no_byte(make_run, method):
    generator = random.Random(method)
    whole = make_run(method, "whole")
    started = time.monotonic()
    whole.complete()
    lasts_s = time.monotonic() - started
    expected = whole.found()
    for attempt in range(20 // len(METHODS) + 1):
        run = make_run(method, f"killed-{attempt}")
        kill_and_continue(run, generator.uniform(0.1, lasts_s))
        kill_and_continue(run, generator.uniform(0.1, lasts_s))
        run.complete()
        assert run.found() == expected


def test_a_killed_run_has_its_rows_once_each_on_the_server(make_run, server):
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}
    more = ["wandb.mode=online", "wandb.entity=team", "wandb.project=project", "wandb.required=true"]
    run = make_run("LoRA", "results", *more, epochs=150, environment=environment)
    for _ in range(2):
        with run.start() as program:
            read_until(program, "step ")
            for process in psutil.Process(program.pid).children(recursive=True)[::-1]:
                process.kill()
            program.stdout.read()
        assert program.returncode == 137
    run.complete()
    stored = server.run(run.run_id)
    keys = [(row["global_step"], "train_loss" in row) for row in stored.history]
    assert len(keys) == len(set(keys)) == 1650
    assert sorted(keys, key=lambda key: (key[0], not key[1])) == keys and stored.state == "finished"


def test_two_processes_on_one_run_one_works_and_one_says_who_does(make_run):
    run = make_run("LoRA")
    with run.start() as first:
        read_until(first, "step ")
        with run.start() as second:
            told = second.stdout.read()
        assert second.returncode == EXIT_HELD
        assert told.startswith(f"error: run {run.run_id} is being made by process ")
        first.stdout.read()
    assert first.returncode == 0 and run.record().finished
    assert told not in (run.directory / "logs" / "full.log").read_text()


def test_a_killed_parent_takes_the_run_with_it(make_run):
    run = make_run("LoRA", epochs=3000)
    with run.start() as program:
        read_until(program, "step ")
        psutil.Process(program.pid).kill()
        program.stdout.read()
    assert wait_for_none(run.results) == []
    (attempt,) = run.attempts()
    assert attempt["outcome"] == "stopped"


def test_a_reader_that_goes_away_changes_nothing(make_run):
    run = make_run("LoRA")
    with run.start() as program:
        read_until(program, "step ")
        program.stdout.close()
    assert program.returncode == 0 and run.record().finished
    log = (run.directory / "logs" / "full.log").read_text()
    assert "step 300/300" in log and "after the last epoch" in log


def test_a_study_passes_signals_on_and_leaves_nothing_behind(tiny_roberta, tiny_glue, tmp_path):
    command = [
        sys.executable, "-m", "fwlora.experiment.cli", "study", "minilm-cola", f"results_dir={tmp_path}",
        f"run.model.pretrained_id={tiny_roberta}", f"run.dataset.name={tiny_glue}", "run.training.epochs=3000",
        "run.model.parameter_budget_percent=5.0", "wandb.mode=offline",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as study:  # fmt: skip
        read_until(study, "step ")
        asked = time.monotonic()
        study.send_signal(signal.SIGTERM)
        printed = study.communicate()[0]
    assert study.returncode == 143 and time.monotonic() - asked < 15, printed
    assert wait_for_none(tmp_path, 3.0) == []


def test_results_that_are_removed_are_no_success(make_run):
    run = make_run("LoRA")
    with run.start() as program:
        read_until(program, "step ")
        shutil.rmtree(run.results)
        printed = program.stdout.read()
    assert program.returncode == EXIT_UNRECORDED, printed
    assert "its record is not whole" in printed and "Traceback" not in printed


def test_a_killed_service_of_wandb_is_no_success_and_the_same_command_completes_the_record(make_run):
    whole, run = make_run("AdaLoRA", "whole"), make_run("AdaLoRA")
    whole.complete()
    with run.start() as program:
        read_until(program, "step ")
        (child,) = psutil.Process(program.pid).children()
        for service in child.children():
            service.kill()
        printed = program.stdout.read()
    assert program.returncode == EXIT_UNRECORDED, printed
    assert "the same command completes it" in printed and "Traceback" not in printed
    run.complete()
    assert run.found() == whole.found()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, on which room is scarce."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_a_run_and_with_room_the_same_command_continues_it(make_run, small_disk):
    whole, run = make_run("LoRA", "whole"), make_run("LoRA", str(small_disk))
    whole.complete()
    with run.start() as program:
        read_until(program, "step ")
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(b"0" * 65_536)
                    file.flush()
            except OSError:
                pass
        printed = program.stdout.read()
    assert program.returncode not in (0, None), printed
    assert "no room left" in printed and "Traceback" not in printed, printed
    filler.unlink()
    run.complete()
    assert run.found() == whole.found()


def test_no_process_of_these_tests_is_left(tmp_path):
    assert list(list_programs(tmp_path.parent)) == []
