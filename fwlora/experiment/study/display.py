"""Show the progress of a study: lines for logs, a bar per run for terminals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fwlora.experiment.engine.progress import parse_progress
from fwlora.experiment.study.spec import PlannedRun

TAIL_LINES = 15


class Display(ABC):
    """Show what runs print and how they end; lines come from any thread."""

    @abstractmethod
    def show_line(self, run: PlannedRun, line: str) -> None:
        """Show a line that a run printed."""

    @abstractmethod
    def finish(self, run: PlannedRun, exit_code: int) -> None:
        """Show how a run ended; of one that failed its last lines, unless they are shown already."""


class LineDisplay(Display):
    """Print every line, with the run's number.

    Args:
        console: to print on.
        runs: all runs of the study, in order.
    """

    def __init__(self, console: Console, runs: Sequence[PlannedRun]) -> None:
        self._console = console
        self._numbers = {run.run_id: f"[{number}/{len(runs)}]" for number, run in enumerate(runs, start=1)}

    def show_line(self, run: PlannedRun, line: str) -> None:
        """Print it."""
        self._console.print(f"{self._numbers[run.run_id]} {line}", markup=False, highlight=False, soft_wrap=True)

    def finish(self, run: PlannedRun, exit_code: int) -> None:
        """Do nothing: every line is there."""


class BarDisplay(Display):
    """Show a bar per run.

    Args:
        console: to print last lines on.
        runs: all runs of the study, in order.
        progress: the bars.
    """

    def __init__(self, console: Console, runs: Sequence[PlannedRun], progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._tasks = {
            run.run_id: progress.add_task(run.run_id, total=None, start=False, status="waiting") for run in runs
        }
        self._tails: dict[str, list[str]] = {}

    def show_line(self, run: PlannedRun, line: str) -> None:
        """Start the bar with the first line, and move it where the line is one of progress."""
        task = self._tasks[run.run_id]
        if run.run_id not in self._tails:
            self._progress.start_task(task)
            self._progress.update(task, status="loading")
        self._tails[run.run_id] = [*self._tails.get(run.run_id, []), line][-TAIL_LINES:]
        step = parse_progress(line)
        if step is not None:
            status = f"loss {step.loss:.3f}" + ("  Fisher warm-up" if step.in_warmup else "")
            self._progress.update(task, completed=step.step, total=step.total_steps, status=status)

    def finish(self, run: PlannedRun, exit_code: int) -> None:
        """Stop the bar; print the last lines of a run that failed."""
        task = self._tasks[run.run_id]
        self._progress.stop_task(task)
        self._progress.update(task, status="failed" if exit_code else "done")
        for line in self._tails.get(run.run_id, []) if exit_code else []:
            self._console.print(line, markup=False, highlight=False)


@contextmanager
def open_display(console: Console, runs: Sequence[PlannedRun]) -> Iterator[Display]:
    """Open the display that suits a console: bars on a terminal, else lines."""
    if not console.is_terminal:
        yield LineDisplay(console, runs)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield BarDisplay(console, runs, progress)


def format_duration(seconds: float) -> str:
    """Write seconds for people: ``75.2`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
