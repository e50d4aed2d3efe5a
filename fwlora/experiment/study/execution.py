"""Carry out a planned study: every run through a launcher, then the evaluations."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from rich.console import Console

from fwlora.experiment.study.display import Display, open_display
from fwlora.experiment.study.launch import DEFAULT_LAUNCHER, LaunchContext, Launcher, Outcome, open_launcher
from fwlora.experiment.study.spec import PlannedEvaluation, PlannedRun, plan_evaluations


def run_study(
    planned: Sequence[PlannedRun], repository: Path, console: Console, launcher: str = DEFAULT_LAUNCHER
) -> int:
    """Make every run, then evaluate them; after a failure nothing more is started.

    Args:
        planned: the runs, in the order of their starts.
        repository: the checkout.
        console: where progress and results are shown.
        launcher: name of what starts the runs.

    Returns:
        The exit code of the first command that fails, else 0.

    Raises:
        UserError: an unknown launcher.
    """
    with open_display(console, planned) as display:
        with open_launcher(launcher, LaunchContext(repository, display.show_line)) as opened:
            failed = _make_runs(planned, opened, display, repository, console)
        if failed:
            return failed
    evaluations = plan_evaluations(planned)
    if not evaluations:
        console.print("trial runs have no records; nothing is evaluated", highlight=False)
    for evaluation in evaluations:
        exit_code = _evaluate(evaluation, repository, console)
        if exit_code:
            return exit_code
    return 0


def _make_runs(
    planned: Sequence[PlannedRun], launcher: Launcher, display: Display, repository: Path, console: Console
) -> int:
    """Make runs until one fails; return its exit code, else 0."""
    waiting, running = deque(planned), dict[Future[Outcome], PlannedRun]()
    while waiting or running:
        while waiting and len(running) < launcher.parallel:
            run = waiting.popleft()
            running[launcher.submit(run)] = run
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            run, exit_code = running.pop(future), future.result().exit_code
            if exit_code:
                log = repository / run.log
                console.print(
                    f"{run.run_id} failed with exit code {exit_code}; its log is {log}", style="red", highlight=False
                )
            display.finish(run, exit_code)
            if exit_code:
                return exit_code
    return 0


def _evaluate(evaluation: PlannedEvaluation, repository: Path, console: Console) -> int:
    """Evaluate one folder; print the results, and in place of every path the report's."""
    command = [sys.executable, "-m", "src.evaluate", *evaluation.arguments]
    done = subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    written = [line for line in lines if line.startswith(evaluation.results_dir)]
    for line in lines:
        if line not in written:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if done.returncode:
        return done.returncode
    figures = sum(line.endswith(".pdf") for line in written)
    place = repository / evaluation.results_dir / "comparison"
    console.print(f"{len(written)} files written, {figures} of them figures: {place}", highlight=False, soft_wrap=True)
    report = next((line for line in written if line.endswith("report.html")), None)
    if report:
        console.print(f"report: {repository / report}", highlight=False, soft_wrap=True)
    return 0
