"""The contract's command line: rewritten into what Hydra understands, and the composed result turned into settings.

``run=<id>`` selects a file of ``config/runs`` and ``run.<key>=<value>`` changes a key inside it. Hydra knows neither:
the group is named ``runs``, and a node cannot be selected and overridden under one name. Before Hydra sees the
arguments, ``run=X`` becomes ``runs@run=X`` and every other value becomes a forced override, so that one validator can
report all unknown keys at once.

A process composes once. ``src.main`` hands its settings to the ``src.train`` that it starts, see :class:`Invocation`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fwlora.experiment.errors import UserError, user_errors_exit
from fwlora.experiment.files import load_yaml
from fwlora.experiment.paths import RESULTS_VARIABLE
from fwlora.experiment.pipeline_contract import describe_edited_copy
from fwlora.experiment.plugins import load_plugins
from fwlora.experiment.settings.modes import get_mode, known_modes
from fwlora.experiment.settings.resolve import resolve_settings
from fwlora.experiment.settings.schema import ProgramSettings, program_settings_class
from fwlora.experiment.tracking import environment_defaults, project_keys, text_keys

# Values of these keys are text whatever they look like.
TEXT_KEYS = (
    "results_dir", "tracker", "run.dataset.name", "run.model.pretrained_id", "run.dataset.revision",
    "run.model.revision",
)  # fmt: skip
USAGE = """\
usage: python -u -m {program} run=<run_id> results_dir=<dir> mode=<mode> [run.<key>=<value> ...]

  run          a file of config/runs, by its name; <run_id>-s<N> is the same with seed N
  results_dir  where logs, adapters and the tracker's files go, under <run_id>/
               (empty: the variable RESULTS_DIR, or .research/results)
  mode         one of:
{modes}

known run ids:
{run_ids}"""
# A part of the names of files, artifacts and branches, which pipelines hand to shells without quotes.
RUN_ID = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.|lock$|$))*", re.ASCII)
ENVIRONMENT_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:")
# What W&B still takes in its variable, and means by it.
LEGACY_VALUES = {("WANDB_MODE", "dryrun"): "offline", ("WANDB_MODE", "run"): "online"}
# Carries an invocation from src.main to the src.train that it starts.
HANDED_VARIABLE = "FWLORA_INVOCATION"
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class Invocation:
    """What a program was asked to do.

    Attributes:
        settings: validated; those of a trial are limited already.
        overrides: the arguments for Hydra that the settings were composed from.
        command: as a user typed it into a shell.
    """

    settings: ProgramSettings
    overrides: tuple[str, ...]
    command: str

    def hand_over(self) -> dict[str, str]:
        """Return the environment variable from which a child with these overrides takes this invocation."""
        content = {
            "overrides": self.overrides,
            "command": self.command,
            "tracker": self.settings.tracker,
            "settings": self.settings.model_dump(mode="json"),
        }
        return {HANDED_VARIABLE: json.dumps(content)}

    @classmethod
    def take_over(cls, overrides: Sequence[str], handed: str | None) -> Invocation | None:
        """Return the invocation that a parent handed over; None where there is none, or one of other overrides.

        Args:
            overrides: the program's own arguments.
            handed: value of the environment variable.
        """
        content = json.loads(handed) if handed else {}
        if content.get("overrides") != list(overrides):
            return None
        settings_class = program_settings_class(content["tracker"])
        settings = settings_class.model_validate({**content["settings"], "tracker": content["tracker"]})
        return cls(settings, tuple(overrides), content["command"])


def known_run_ids(config_dir: Path) -> list[str]:
    """Return the names of the files in ``config/runs``."""
    return sorted(path.name.removesuffix(".yaml") for path in (config_dir / "runs").glob("*.yaml"))


def usage(program: str, config_dir: Path) -> str:
    """Return the help text."""
    return USAGE.format(
        program=program,
        modes="\n".join(f"    {name:<7} {mode.summary}" for name, mode in known_modes().items()),
        run_ids="\n".join(f"  {run_id}" for run_id in known_run_ids(config_dir)),
    )


def prepare_arguments(argv: Sequence[str], config_dir: Path, environment: Mapping[str, str]) -> list[str]:
    """Return arguments for Hydra; prepared ones stay as they are.

    Args:
        argv: arguments after the program's name.
        config_dir: the folder that holds ``runs/``.
        environment: variables by name; ``RESULTS_DIR`` and a tracker's, such as ``WANDB_MODE``, apply where the command
            line sets nothing.

    Raises:
        UserError: missing or unknown run, missing or unknown mode, malformed arguments: all of them at once.
    """
    flags = [argument for argument in argv if argument.startswith("-")]
    values, passed_on, problems = _split_arguments([argument for argument in argv if argument not in flags])
    multirun = _is_multirun(flags)
    selected, values, found = _select_runs(values, config_dir, multirun)
    problems += found
    mode = values.get("mode", "").strip("'\"")
    if mode not in known_modes():
        problems.append(f"mode is {mode or 'missing'}; give mode={' or mode='.join(known_modes())}")
    else:
        values = {**_name_projects(get_mode(mode).project_suffix, config_dir, environment), **values}
    if environment.get(RESULTS_VARIABLE):
        values["results_dir"] = values.get("results_dir") or environment[RESULTS_VARIABLE]
    for key, variable in environment_defaults().items():
        if environment.get(variable):
            values.setdefault(key, LEGACY_VALUES.get((variable, environment[variable]), environment[variable]))
    overrides = {key: _as_override(key, value, multirun) for key, value in values.items()}
    problems += [
        f"{key}={values[key]}: not a value that Hydra can read; quote it"
        for key, override in overrides.items()
        if not _parses(override)
    ]
    if multirun and mode in known_modes() and get_mode(mode).is_recorded:
        problems += _find_shared_ids(overrides, values)
    if problems:
        raise UserError.collect("command line", problems)
    unreadable = list(_check_run_files(selected, config_dir))
    if unreadable:
        raise UserError("\n".join(unreadable))
    return [*flags, *passed_on, *selected, *overrides.values()]


def _name_projects(suffix: str, config_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the projects of a mode whose runs are recorded apart: key -> the configured project with the suffix."""
    keys = project_keys() if suffix else []
    named: dict[str, str] = {}
    for key in keys:
        with suppress(ValueError, OmegaConfBaseException):  # which composing reports
            configured = OmegaConf.select(load_yaml(config_dir / "config.yaml"), key)
            project = environment.get(environment_defaults().get(key, "")) or configured
            if project:
                named[key] = f"{str(project).removesuffix(suffix)}{suffix}"
    return named


def _check_run_files(selected: Sequence[str], config_dir: Path) -> Iterator[str]:
    """Yield what is wrong with the run files before Hydra, whose own reader trusts them, composes them."""
    for file_id in (name for item in selected for name in item.partition("=")[2].split(",") if name):
        if edited := describe_edited_copy(config_dir, file_id):
            yield edited
        try:
            load_yaml(config_dir / "runs" / f"{file_id}.yaml")
        except ValueError as error:
            yield f"config/runs/{file_id}.yaml: {error}"


def enter_program(
    program: str, hydra_main: Callable[[], None], run: Callable[[Invocation], None], config_dir: Path
) -> None:
    """Run a program on the contract's command line, or on what its parent handed over.

    Everything that the arguments and the run file can get wrong ends in one message and exit code 2.

    Args:
        program: its name after ``python -m``.
        hydra_main: decorated by ``hydra.main``; calls :func:`run_task`.
        run: does what the invocation asks for.
        config_dir: the folder that holds ``config.yaml`` and ``runs/``.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage(program, config_dir))
        return
    with user_errors_exit():
        load_plugins()
        handed = Invocation.take_over(arguments, os.environ.pop(HANDED_VARIABLE, None))
        if handed is not None:
            run(handed)
            return
        sys.argv[1:] = prepare_arguments(arguments, config_dir, os.environ)
        try:
            with _composition_errors_name_the_file(sys.argv[1:]):
                hydra_main()
        except TaskError as failed:
            raise failed.error from None


class TaskError(Exception):
    """Carries an error of a task through Hydra, apart from those of the composition.

    Attributes:
        error: of the task.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def run_task(composed: DictConfig, run: Callable[[Invocation], None], config_dir: Path) -> None:
    """Do what a task of Hydra asks for; a user's mistake ends the process with one message and exit code 2.

    Args:
        composed: the configuration that Hydra hands to its task.
        run: does it.
        config_dir: the folder that holds ``config.yaml`` and ``runs/``.

    Raises:
        TaskError: ``run`` failed.
    """
    overrides = tuple(HydraConfig.get().overrides.task)
    # What the interpreter was started with, whatever was done to sys.argv.
    command = shlex.join(["python", *sys.orig_argv[1:]])
    with user_errors_exit():
        invocation = Invocation(resolve_composed(composed, overrides, config_dir), overrides, command)
        try:
            run(invocation)
        except UserError:
            raise
        except Exception as error:
            raise TaskError(error) from error


def resolve_composed(composed: DictConfig, overrides: Sequence[str], config_dir: Path) -> ProgramSettings:
    """Return validated settings from what Hydra composed.

    Args:
        composed: Hydra's configuration.
        overrides: the prepared arguments it was composed from; they name the run file.
        config_dir: the folder that holds ``config.yaml`` and ``runs/``.

    Raises:
        UserError: see :func:`fwlora.experiment.settings.resolve.resolve_settings`.
    """
    file_id = _find_file_id(overrides)
    try:
        run_file = OmegaConf.to_container(load_yaml(config_dir / "runs" / f"{file_id}.yaml"))
        written = OmegaConf.to_container(composed, resolve=False)
        interpolated = list(_find_interpolated_variables(written))
        if interpolated:
            raise UserError(
                f"config/runs/{file_id}.yaml and its overrides: {', '.join(interpolated)}: ${{oc.env:...}} would write "
                "an environment variable into the record of the run; give the value itself"
            )
        plain: Any = OmegaConf.to_container(composed, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"config/runs/{file_id}.yaml: {str(error).splitlines()[0]}") from None
    assert isinstance(run_file, dict), "load_yaml gives mappings"
    if run_file.get("run_id") != file_id:
        raise UserError(
            f"config/runs/{file_id}.yaml: run_id is {run_file.get('run_id')!r}; it must be the file's name, {file_id!r}"
        )
    training = run_file.get("training")
    file_seed = training.get("seed") if isinstance(training, dict) else None
    return resolve_settings(plain, file_id=file_id, file_seed=file_seed)


def compose_settings(argv: Sequence[str], config_dir: Path, environment: Mapping[str, str]) -> ProgramSettings:
    """Return the settings of a command line without running it: what ``python -m src.main`` would use.

    Raises:
        UserError: anything wrong with the arguments or the run file.
    """
    overrides = prepare_arguments(argv, config_dir, environment)
    with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
        with _composition_errors_name_the_file(overrides):
            composed = compose("config", overrides)
        return resolve_composed(composed, overrides, config_dir)


@contextmanager
def _composition_errors_name_the_file(overrides: Sequence[str]) -> Iterator[None]:
    """Turn errors of Hydra's composition into one message.

    Raises:
        UserError: Hydra cannot compose the run file and the overrides.
    """
    # Otherwise hydra.main prints a message of its own and ends the process with exit code 1.
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except UserError:
        raise
    except _COMPOSITION_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config/runs/{_find_file_id(overrides)}.yaml cannot be composed: {reason}") from None
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _find_file_id(overrides: Sequence[str]) -> str:
    return next(item.partition("=")[2] for item in overrides if item.startswith("runs@run="))


def _is_multirun(arguments: Sequence[str]) -> bool:
    return not {"-m", "--multirun"}.isdisjoint(arguments)


def _split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return values by key, arguments that are Hydra's own, and what is wrong with the others."""
    values: dict[str, str] = {}
    passed_on, problems = [], []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        name = key.lstrip("+~")
        if name.startswith("hydra") or key.startswith("~"):
            passed_on.append(argument)
        elif not separator or not name:
            problems.append(f"{argument!r} is not of the form key=value")
        else:
            name = "run" if name == "runs@run" else name
            if values.get(name, value) != value:
                problems.append(f"{name} is given twice: {values[name]!r} and {value!r}")
            values[name] = value
    return values, passed_on, problems


def _select_runs(
    values: Mapping[str, str], config_dir: Path, multirun: bool
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return Hydra's selection of the run files, the other values with what a run id says of them, and problems."""
    values = dict(values)
    run = values.pop("run", None)
    if not run:
        return [], values, [f"run is missing; give run=<run_id>, one of: {', '.join(known_run_ids(config_dir))}"]
    files, problems = [], []
    for run_id in run.split(",") if multirun else [run]:
        try:
            file_id, seed = split_run_id(run_id, config_dir)
        except UserError as error:
            problems.append(str(error))
            continue
        files.append(file_id)
        if seed is None:
            continue
        if multirun:
            problems.append(f"run={run_id}: with --multirun name the seeds by run.training.seed=1,2")
        elif values.get("run.training.seed", str(seed)) != str(seed):
            problems.append(f"run={run_id} means seed {seed}, but run.training.seed={values['run.training.seed']}")
        elif values.get("run.run_id", run_id).strip("'\"") != run_id:
            problems.append(f"run={run_id} and run.run_id={values['run.run_id']} name two ids; give one of them")
        else:
            values["run.training.seed"] = str(seed)
            values["run.run_id"] = run_id
    return [f"runs@run={','.join(files)}"], values, problems


def split_run_id(run_id: str, config_dir: Path) -> tuple[str, int | None]:
    """Return the file and the seed that a run id names; ``<file>-s<N>`` is the file with seed N.

    Raises:
        UserError: no file has the name, or it cannot be a run id.
    """
    known = known_run_ids(config_dir)
    if run_id in known:
        if not RUN_ID.fullmatch(run_id) or not _is_text(run_id):
            raise UserError(
                f"run={run_id}: rename the file; a run id is of letters, digits, '_', '-' and single '.', begins with "
                "no '-' or '.', ends in no '.' or '.lock', and is no number"
            )
        return run_id, None
    with_seed = re.fullmatch(r"(.+)-s(0|[1-9][0-9]*)", run_id)
    if with_seed and with_seed.group(1) in known:
        return with_seed.group(1), int(with_seed.group(2))
    if re.search(r"[/\\]", run_id) or run_id in (".", ".."):
        raise UserError(f"run={run_id}: a run id names a file of config/runs and holds no path separator")
    near = difflib.get_close_matches(run_id, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"run={run_id}: unknown run id; {hint}known: {', '.join(known) or 'none'}")


def _is_text(value: str) -> bool:
    """Return whether Hydra reads a value as text and not as a number, a truth value or null."""
    return _parses(f"x={value}") and isinstance(OverridesParser.create().parse_override(f"x={value}").value(), str)


def _as_override(key: str, value: str, multirun: bool) -> str:
    """Return a forced override, its value quoted where it is text, or where Hydra cannot read it otherwise."""
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    cleared = value == "null" and key.endswith("revision")
    if (key in TEXT_KEYS or key in text_keys()) and not quoted and not cleared and not (multirun and "," in value):
        value = _quote(value)
    override = f"++{key}={value}"
    return override if _parses(override) else f"++{key}={_quote(value)}"


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'") if value.endswith("\\") else value.replace("'", "\\'")
    return f"'{escaped}'"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError):
        return False
    return True


def _find_shared_ids(overrides: Mapping[str, str], values: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each value that --multirun varies without giving its jobs run ids of their own."""
    for key, override in overrides.items():
        if key in ("run.training.seed", "run.run_id", "mode") or not _parses(override):
            continue
        if OverridesParser.create().parse_override(override).is_sweep_override():
            first, second, *_ = [*_list_choices(override), "...", "..."]
            yield (
                f"--multirun varies {key}={values[key]}, and its jobs ({key}={first}, {key}={second}, ...) would have "
                "one run id, so that each replaces the one before; give each a run file, or vary run and "
                "run.training.seed alone"
            )


def _list_choices(override: str) -> list[str]:
    parsed = OverridesParser.create().parse_override(override)
    try:
        return list(parsed.sweep_string_iterator())
    except (HydraException, ValueError, TypeError):
        return []


def _find_interpolated_variables(node: object, path: str = "") -> Iterator[str]:
    """Yield the paths of values that would read an environment variable, a secret for instance, into a record."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _find_interpolated_variables(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _find_interpolated_variables(value, f"{path}[{place}]")
    elif isinstance(node, str) and ENVIRONMENT_VARIABLE.search(node):
        yield path
