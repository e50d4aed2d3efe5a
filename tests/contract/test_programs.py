"""Programs that are forked by a process that imported everything, against the same programs started anew."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from fwlora.experiment import programs
from fwlora.experiment.programs import WarmServer, start_program
from tests.helpers.paths import REPOSITORY

TRIAL = ["run=comparative-1-minilm-L6--acceptability", "mode=trial", "engine.device=cpu"]
# A line of what a run prints, without the seconds.
TIMED = "training "


@pytest.fixture(scope="module")
def server() -> WarmServer:
    assert WarmServer.serves(REPOSITORY)
    return WarmServer()


def finish(program) -> tuple[int, list[str]]:
    with program:
        lines = [line.rstrip("\n") for line in program.stdout]
    return program.returncode, lines


def without_times(lines: list[str]) -> list[str]:
    return [line.partition(TIMED)[0] for line in lines]


@pytest.mark.usefixtures("minilm")
def test_forks_are_the_programs_that_new_interpreters_are(server, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def log(folder) -> list[str]:
        path = tmp_path / folder / "comparative-1-minilm-L6--acceptability" / "logs" / "trial.log"
        return without_times(path.read_text().splitlines())[1:]

    code, first = finish(server.start("src.main", [*TRIAL, f"results_dir={tmp_path}/a"], environment, REPOSITORY))
    assert code == 0 and len(first) > 4, first
    started = time.perf_counter()
    code, second = finish(server.start("src.main", [*TRIAL, f"results_dir={tmp_path}/b"], environment, REPOSITORY))
    warm = time.perf_counter() - started
    started = time.perf_counter()
    cold_code, new = finish(start_program("src.main", [*TRIAL, f"results_dir={tmp_path}/c"], environment, REPOSITORY))
    cold = time.perf_counter() - started
    assert code == cold_code == 0
    assert without_times(first) == without_times(second) == without_times(new)
    assert log("a") == log("b") == log("c") == without_times(new)
    assert warm < cold / 2, f"{warm:.1f} s from a fork, {cold:.1f} s anew"


def test_a_run_from_a_fork_imports_nothing_of_weight(server, tiny_roberta, tmp_path):
    arguments = [
        "run=proposed-minilm-L6--acceptability", "mode=full", f"results_dir={tmp_path}", "wandb.mode=offline",
        "run.training.epochs=1", "run.dataset.train_examples=64", "run.dataset.eval_examples=8",
        "run.fw_lora.warmup_steps=1", f"run.model.pretrained_id={tiny_roberta}",
    ]  # fmt: skip
    code, lines = finish(server.start("tests.helpers.report_imports", arguments, os.environ, REPOSITORY))
    assert code == 0, lines
    imported = json.loads(lines[-1])
    heavy = {"torch", "transformers", "peft", "numpy", "scipy", "sklearn", "pandas", "wandb", "hydra", "datasets"}
    by_package = {name: [m for m in imported if m.split(".")[0] == name] for name in heavy}
    assert sum(map(len, by_package.values())) < 40, by_package


CODE = """
import os, signal, sys, threading, atexit
print(os.getpid(), os.getcwd(), sys.argv[1:], __name__, os.environ.get("MARK"), sys.stdin.read() == "")
atexit.register(print, "exit function")
what = sys.argv[1]
if what == "text": sys.exit("a message")
if what == "code": sys.exit(7)
if what == "error": raise ValueError("wrong")
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    print("waiting"); threading.Event().wait(60)
if what == "interrupted":
    try: print("waiting"); threading.Event().wait(60)
    except KeyboardInterrupt: sys.exit(130)
threading.Timer(0.2, print, ["a thread"]).start()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "some_program.py").write_text(CODE)
    return tmp_path


def start_both(server, arguments, folder):
    environment = {**os.environ, "MARK": "x"}
    return [start("some_program", arguments, environment, folder) for start in (server.start, start_program)]


@pytest.mark.parametrize("what", ["nothing", "text", "code", "error", "kill"])
def test_arguments_environment_streams_and_exit_codes_are_those_of_a_new_interpreter(server, what, folder):
    found = []
    for program in start_both(server, [what, "b c"], folder):
        code, lines = finish(program)
        first = lines[0].split(" ", 1)
        assert int(first[0]) == program.pid != os.getpid()
        assert first[1] == f"{folder} ['{what}', 'b c'] __main__ x True"
        found.append((code, [line for line in lines[1:] if not line.startswith("  ")]))
    assert found[0] == found[1]
    assert found[0][0] == {"nothing": 0, "text": 1, "code": 7, "error": 1, "kill": -signal.SIGKILL}[what]


@pytest.mark.parametrize(("what", "number"), [("wait", signal.SIGTERM), ("interrupted", signal.SIGINT)])
def test_signals_end_a_fork_as_they_end_a_new_interpreter(server, what, number, folder):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("this process ignores the signal, as one in the background does, and so do those that it starts")
    for program in start_both(server, [what], folder):
        with program:
            lines = iter(program.stdout)
            while "waiting" not in next(lines):
                pass
            program.send_signal(number)
        assert program.returncode == (130 if number == signal.SIGINT else -number)
        program.send_signal(number)  # it has ended: nothing happens
        assert program.wait() == program.returncode


def test_a_fork_forks_the_programs_that_it_starts(server, folder):
    (folder / "parent_program.py").write_text(
        "import os, sys\nfrom fwlora.experiment.programs import start_program\n"
        "with start_program('some_program', ['code', *sys.argv[1:]], {**os.environ, 'MARK': 'y'}) as child:\n"
        "    print(type(child).__name__, *child.stdout, sep='|')\nsys.exit(child.returncode)\n"
    )
    code, lines = finish(server.start("parent_program", ["z"], os.environ, folder))
    assert code == 7
    assert lines[0].startswith("ForkedProgram|") and "['code', 'z'] __main__ y True" in lines[0]


def test_only_its_own_checkout_is_served(tmp_path, monkeypatch):
    assert not WarmServer.serves(tmp_path)
    monkeypatch.setattr(programs.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert not WarmServer.serves(REPOSITORY)
    assert sys.modules.get("src.train") is None or not programs._preloaded
