from __future__ import annotations

import io
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console

from fwlora.experiment.errors import UserError
from fwlora.experiment.study.execution import run_study
from fwlora.experiment.study.launch import (
    LaunchContext,
    Launcher,
    LocalLauncher,
    Outcome,
    open_launcher,
    register_launcher,
    unregister_launcher,
)
from fwlora.experiment.study.spec import PlannedRun, load_study, plan_study
from tests.helpers.study_repository import RECORD, make_study_repository

RUN = PlannedRun("a", "out", "full", ["run=a"])


class TwoAtOnce(Launcher):
    """Runs nothing; ends runs in pairs, the later one first, and keeps what it was given."""

    parallel = 2

    def __init__(self, context: LaunchContext, exit_codes: dict[str, int]) -> None:
        self.context, self.exit_codes = context, exit_codes
        self.submitted: list[str] = []
        self.open: dict[str, Future[Outcome]] = {}
        self.closed = False

    def submit(self, run: PlannedRun) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self.submitted.append(run.run_id)
        self.open[run.run_id] = future
        assert len(self.open) <= self.parallel
        if len(self.open) == self.parallel:
            for run_id in reversed(list(self.open)):
                self.open.pop(run_id).set_result(Outcome(self.exit_codes.get(run_id, 0)))
        return future

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def launchers():
    made: list[TwoAtOnce] = []
    exit_codes: dict[str, int] = {}

    def make(context: LaunchContext) -> TwoAtOnce:
        made.append(TwoAtOnce(context, exit_codes))
        return made[-1]

    register_launcher("pairs", make)
    yield made, exit_codes
    unregister_launcher("pairs")


@pytest.fixture
def planned(tmp_path):
    repository = make_study_repository(tmp_path, RECORD, RECORD)
    return plan_study(load_study("mine", repository / "config"), repository / "config", {}), repository


def test_a_registered_launcher_makes_the_runs_and_the_study_evaluates_them(launchers, planned):
    (made, _), (runs, repository) = launchers, planned
    assert run_study(runs, repository, Console(file=io.StringIO()), "pairs") == 0
    assert made[0].submitted == [run.run_id for run in runs] and made[0].closed
    assert made[0].context.repository == repository
    assert len((repository / "calls").read_text().splitlines()) == 1, "the evaluation alone ran here"


def test_a_failure_ends_a_study_of_runs_in_parallel(launchers, planned):
    (made, exit_codes), (runs, repository) = launchers, planned
    exit_codes[runs[1].run_id] = 5
    out = io.StringIO()
    assert run_study(runs, repository, Console(file=out, width=300), "pairs") == 5
    assert made[0].submitted == [run.run_id for run in runs[:2]] and made[0].closed
    assert f"its log is {repository / 'out' / runs[1].run_id / 'logs' / 'full.log'}" in out.getvalue()
    assert not (repository / "calls").exists()


def test_unknown_and_taken_names(planned, launchers):
    runs, repository = planned
    with pytest.raises(UserError, match="launcher 'cloud' is unknown; known: local, pairs"):
        run_study(runs, repository, Console(file=io.StringIO()), "cloud")
    with pytest.raises(ValueError, match="'local' is taken"):
        register_launcher("local", TwoAtOnce)
    register_launcher("local", LocalLauncher)


def test_local_launcher_passes_lines_on_and_returns_the_exit_code(tmp_path):
    repository = make_study_repository(tmp_path, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)")
    lines: list[str] = []
    with open_launcher(
        "local", LaunchContext(repository, lambda run, line: lines.append(f"{run.run_id} {line}"))
    ) as it:
        assert it.submit(RUN).result(timeout=30) == Outcome(3)
    assert sorted(lines) == ["a one", "a two"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_closing_the_local_launcher_stops_the_run_and_starts_no_other(tmp_path):
    repository = make_study_repository(
        tmp_path, "import time; print('up', flush=True); time.sleep(60); open('survived', 'w')"
    )
    up = threading.Event()
    launcher = LocalLauncher(LaunchContext(repository, lambda run, line: up.set()))
    running, waiting = launcher.submit(RUN), launcher.submit(RUN)
    assert up.wait(30)
    started = time.monotonic()
    launcher.close()
    assert time.monotonic() - started < 20
    assert running.result().exit_code == -15 and waiting.cancelled()


def test_runs_share_a_cache_even_where_the_machines_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    repository = make_study_repository(tmp_path / "a", "import os; print(os.environ.get('FWLORA_CACHE_DIR'))")

    def caches_of_two_runs() -> list[str]:
        lines: list[str] = []
        with LocalLauncher(LaunchContext(repository, lambda run, line: lines.append(line))) as launcher:
            assert [launcher.submit(RUN).result().exit_code for _ in range(2)] == [0, 0]
        return lines

    monkeypatch.setenv("FWLORA_CACHE_DIR", str(tmp_path / "cache"))
    assert caches_of_two_runs() == [str(tmp_path / "cache")] * 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FWLORA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    first, second = caches_of_two_runs()
    assert first == second != str(tmp_path / "file" / "cache") and not Path(first).exists()
