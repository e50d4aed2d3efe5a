"""A study: several runs through the contract's commands, one after the other, then their evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from yaml import YAMLError

from fwlora.experiment.engine.progress import parse_progress
from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.hydra_arguments import compose_settings

TAIL_LINES = 15


class StudyRun(BaseModel):
    """An entry of ``runs`` with arguments of its own, which win over the study's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    run: str
    overrides: list[str] = Field(default_factory=list)


class Study(BaseModel):
    """A file of ``config/study``.

    Attributes:
        results_dir: where runs and their comparison go, from the repository's root.
        runs: run ids, or a run id with overrides.
        seeds: every run is made with each of them; null keeps the files' own.
        overrides: further arguments of every run, e.g. ``wandb.mode=offline``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    results_dir: str = Field(min_length=1)
    runs: list[str | StudyRun] = Field(min_length=1)
    seeds: list[int] | None = None
    overrides: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: the id it will have, where it goes, and the arguments of ``src.main``."""

    run_id: str
    results_dir: str
    arguments: list[str]


def known_studies(config_dir: Path) -> list[str]:
    """Names of the files in ``config/study``."""
    return sorted(path.stem for path in (config_dir / "study").glob("*.yaml"))


def load_study(name: str, config_dir: Path) -> Study:
    """The study of that name.

    Raises:
        UserError: unknown name, or a file with unknown keys or wrong types, all at once.
    """
    if name not in known_studies(config_dir):
        raise UserError(f"study {name!r} is unknown; config/study has {', '.join(known_studies(config_dir)) or 'none'}")
    try:
        return Study.model_validate(OmegaConf.to_container(OmegaConf.load(config_dir / "study" / f"{name}.yaml")))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError.collect(f"config/study/{name}.yaml", problems) from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"config/study/{name}.yaml cannot be read: {error}") from None


def plan_study(
    study: Study, config_dir: Path, environment: Mapping[str, str], extra_overrides: Sequence[str] = ()
) -> list[PlannedRun]:
    """Every run of the study, seeds outermost, each checked before the first one starts.

    Raises:
        UserError: any run whose arguments would be refused, all at once.
    """
    planned, problems = [], []
    seeds: list[int | None] = list(study.seeds) if study.seeds else [None]
    for seed in seeds:
        for entry in study.runs:
            run, own = (entry, []) if isinstance(entry, str) else (entry.run, entry.overrides)
            seed_override = [] if seed is None else [f"run.training.seed={seed}"]
            given = [f"run={run}", f"results_dir={study.results_dir}", "mode=full", *seed_override]
            given += [*study.overrides, *own, *extra_overrides]
            # Of two values for one key the later counts.
            arguments = list({item.partition("=")[0]: item for item in given}.values())
            try:
                settings = compose_settings(arguments, config_dir, environment)
                planned.append(PlannedRun(settings.run.run_id, settings.results_dir, arguments))
            except UserError as error:
                problems.append(str(error))
    ids = [run.run_id for run in planned]
    problems += [
        f"{run_id} is planned {ids.count(run_id)} times" for run_id in sorted(set(ids)) if ids.count(run_id) > 1
    ]
    if problems:
        raise UserError.collect("study", problems)
    return planned


def run_study(planned: Sequence[PlannedRun], repository: Path, console: Console) -> int:
    """Runs everything and evaluates it; the exit code of the first command that fails, else 0."""
    results_dir = planned[0].results_dir
    with _progress_display(console) as display:
        tasks = [display.add(run.run_id) for run in planned]
        for run, task in zip(planned, tasks, strict=True):
            exit_code = _run_one(run, repository, partial(display.line, task))
            display.finish(task, exit_code)
            if exit_code:
                log = repository / results_dir / run.run_id / "full.log"
                console.print(
                    f"{run.run_id} failed with exit code {exit_code}; its log is {log}", style="red", highlight=False
                )
                display.show_tail()
                return exit_code
    run_ids = json.dumps([run.run_id for run in planned])
    evaluation = [sys.executable, "-m", "src.evaluate", f"results_dir={results_dir}", f"run_ids={run_ids}"]
    done = subprocess.run(evaluation, cwd=repository, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    written = [line for line in lines if line.startswith(results_dir)]
    for line in lines:
        if line not in written:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    figures = sum(line.endswith(".pdf") for line in written)
    report = next((line for line in written if line.endswith("report.html")), None)
    if done.returncode == 0:
        place = repository / results_dir / "comparison"
        console.print(
            f"{len(written)} files written, {figures} of them figures: {place}", highlight=False, soft_wrap=True
        )
        if report:
            console.print(f"report: {repository / report}", highlight=False, soft_wrap=True)
    return done.returncode


def _run_one(run: PlannedRun, repository: Path, take_line: Callable[[str], None]) -> int:
    command = [sys.executable, "-u", "-m", "src.main", *run.arguments]
    with subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                take_line(line.rstrip("\n"))
        except BaseException:
            child.terminate()
            raise
    return child.returncode


class _PlainDisplay:
    """Passes every line on, under the run's id: for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ids: list[str] = []

    def add(self, run_id: str) -> int:
        self._ids.append(run_id)
        return len(self._ids) - 1

    def line(self, task: int, line: str) -> None:
        self._console.print(f"[{task + 1}/{len(self._ids)}] {line}", markup=False, highlight=False, soft_wrap=True)

    def finish(self, task: int, exit_code: int) -> None:
        return

    def show_tail(self) -> None:
        return


class _BarDisplay:
    """A bar per run: for terminals."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._tail: list[str] = []

    def add(self, run_id: str) -> int:
        return int(self._progress.add_task(run_id, total=None, start=False, status="waiting"))

    def line(self, task: int, line: str) -> None:
        task_id = TaskID(task)
        if not self._progress.tasks[task].started:
            self._progress.start_task(task_id)
            self._progress.update(task_id, status="loading")
            self._tail = []
        self._tail = [*self._tail, line][-TAIL_LINES:]
        step = parse_progress(line)
        if step is not None:
            status = f"loss {step.loss:.3f}" + ("  Fisher warm-up" if step.in_warmup else "")
            self._progress.update(task_id, completed=step.step, total=step.total_steps, status=status)

    def finish(self, task: int, exit_code: int) -> None:
        self._progress.stop_task(TaskID(task))
        self._progress.update(TaskID(task), status="failed" if exit_code else "done")

    def show_tail(self) -> None:
        for line in self._tail:
            self._console.print(line, markup=False, highlight=False)


@contextmanager
def _progress_display(console: Console) -> Iterator[_PlainDisplay | _BarDisplay]:
    if not console.is_terminal:
        yield _PlainDisplay(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarDisplay(console, progress)


def find_repository(start: Path) -> Path:
    """The checkout that ``start`` lies in: the nearest folder with ``src/main.py`` and ``config/study``.

    Raises:
        UserError: not in a checkout.
    """
    for folder in (start, *start.parents):
        if (folder / "src" / "main.py").is_file() and (folder / "config" / "study").is_dir():
            return folder
    raise UserError(
        f"{start} is not inside a checkout of fwlora; `fwlora study` runs src.main and src.evaluate from one"
    )


def format_duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
