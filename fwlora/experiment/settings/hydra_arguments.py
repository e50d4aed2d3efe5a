"""The contract's command line: rewritten into what Hydra understands, and the composed result turned into settings.

``run=<id>`` selects a file of ``config/runs`` and ``run.<key>=<value>`` changes a key inside it. Hydra knows neither:
the group is named ``runs``, and a node cannot be selected and overridden under one name. Before Hydra sees the
arguments, ``run=X`` becomes ``runs@run=X`` and every other value becomes a forced override, so that one validator can
report all unknown keys at once.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fwlora.experiment.errors import UserError, user_errors_exit
from fwlora.experiment.plugins import load_plugins
from fwlora.experiment.settings.resolve import resolve_settings
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.tracking import environment_defaults, text_keys

MODES = ("trial", "full")
# Values of these keys are text whatever they look like.
TEXT_KEYS = (
    "results_dir", "tracker", "run.dataset.name", "run.model.pretrained_id", "run.dataset.revision",
    "run.model.revision",
)  # fmt: skip
USAGE = """\
usage: python -u -m {program} run=<run_id> results_dir=<dir> mode=trial|full [run.<key>=<value> ...]

  run          a file of config/runs, by its name; <run_id>-s<N> is the same with seed N
  results_dir  where logs, checkpoints and the tracker's files go, under <run_id>/ (default: .research/results)
  mode         trial: one epoch of two batches, no record, no search; full: everything

known run ids:
{run_ids}"""


def known_run_ids(config_dir: Path) -> list[str]:
    """Names of the files in ``config/runs``."""
    return sorted(path.name.removesuffix(".yaml") for path in (config_dir / "runs").glob("*.yaml"))


def usage(program: str, config_dir: Path) -> str:
    """The help text."""
    return USAGE.format(program=program, run_ids="\n".join(f"  {run_id}" for run_id in known_run_ids(config_dir)))


def prepare_arguments(argv: Sequence[str], config_dir: Path, environment: Mapping[str, str]) -> list[str]:
    """Arguments for Hydra.

    Idempotent, so that a parent can hand prepared arguments to its child.

    Args:
        argv: arguments after the program's name.
        config_dir: the folder that holds ``runs/``.
        environment: variables by name; a tracker's, such as ``WANDB_MODE``, apply where the command line sets nothing.

    Raises:
        UserError: missing or unknown run, missing or unknown mode, malformed arguments: all of them at once.
    """
    problems: list[str] = []
    flags = [argument for argument in argv if argument.startswith("-")]
    values: dict[str, str] = {}
    passed_on: list[str] = []
    for argument in argv:
        if argument.startswith("-"):
            continue
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
    multirun = any(flag in ("-m", "--multirun") for flag in flags)
    selected = _select_runs(values.pop("run", None), values, config_dir, multirun, problems)
    mode = values.get("mode", "").strip("'\"")
    if mode not in MODES:
        problems.append(f"mode is {mode or 'missing'}; give mode=trial or mode=full")
    for key, variable in environment_defaults().items():
        if environment.get(variable):
            values.setdefault(key, environment[variable])
    overrides = selected + [_as_override(key, value, multirun, problems) for key, value in values.items()]
    if problems:
        raise UserError.collect("command line", problems)
    return [*flags, *passed_on, *overrides]


def enter_program(program: str, hydra_main: Callable[[], None], config_dir: Path) -> None:
    """Runs a Hydra program on the contract's command line.

    Everything that the arguments and the run file can get wrong is found before Hydra starts, whose own messages would
    end with exit code 1.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage(program, config_dir))
        return
    with user_errors_exit():
        load_plugins()
        prepared = prepare_arguments(arguments, config_dir, os.environ)
        if not {"-m", "--multirun"} & set(prepared):
            compose_settings(prepared, config_dir, os.environ)
    sys.argv[1:] = prepared
    hydra_main()


def settings_of(composed: DictConfig, overrides: Sequence[str], config_dir: Path) -> ProgramSettings:
    """Validated settings from what Hydra composed.

    Args:
        composed: Hydra's configuration.
        overrides: the prepared arguments it was composed from; they name the run file.
        config_dir: the folder that holds ``config.yaml`` and ``runs/``.

    Raises:
        UserError: see :func:`fwlora.experiment.settings.resolve.resolve_settings`.
    """
    file_id = _file_id(overrides)
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        run_file: Any = OmegaConf.to_container(OmegaConf.load(config_dir / "runs" / f"{file_id}.yaml"))
        defaults: Any = OmegaConf.to_container(OmegaConf.load(config_dir / "config.yaml"))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"config/runs/{file_id}.yaml: {str(error).splitlines()[0]}") from None
    if not isinstance(run_file, dict):
        raise UserError(f"config/runs/{file_id}.yaml: holds {run_file!r}, not a mapping of settings")
    if run_file.get("run_id") != file_id:
        raise UserError(
            f"config/runs/{file_id}.yaml: run_id is {run_file.get('run_id')!r}; it must be the file's name, {file_id!r}"
        )
    training = run_file.get("training")
    file_seed = training.get("seed") if isinstance(training, dict) else None
    return resolve_settings(plain, file_id=file_id, file_seed=file_seed, defaults=defaults)


def compose_settings(argv: Sequence[str], config_dir: Path, environment: Mapping[str, str]) -> ProgramSettings:
    """Settings of a command line without running it: what ``python -m src.main`` would use.

    Raises:
        UserError: anything wrong with the arguments or the run file.
    """
    overrides = prepare_arguments(argv, config_dir, environment)
    with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
        try:
            composed = compose("config", overrides)
        except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"config/runs/{_file_id(overrides)}.yaml cannot be composed: {reason}") from None
        return settings_of(composed, overrides, config_dir)


def restore_command(program: str, overrides: Sequence[str]) -> str:
    """The command line that :func:`prepare_arguments` made ``overrides`` from, as a user would type it into a shell."""
    values = dict(item.partition("=")[::2] for item in overrides)
    file_id, seed = values.get("runs@run", ""), values.get("++run.training.seed")
    by_seed = f"{file_id}-s{seed}"
    named_by_seed = values.get("++run.run_id", "").strip("'\"") == by_seed
    typed = []
    for name, value in values.items():
        if name == "runs@run":
            typed.append(f"run={by_seed if named_by_seed else file_id}")
        elif not (named_by_seed and name in ("++run.run_id", "++run.training.seed")):
            key = name.removeprefix("++")
            bare = value[1:-1] if value[:1] == value[-1:] == "'" else value
            keeps = name.startswith("++") and _as_override(key, bare, False, []) == f"{name}={value}"
            typed.append(f"{key}={bare if keeps else value}" if value else name)
    return shlex.join(["python", "-u", "-m", program, *typed])


def _file_id(overrides: Sequence[str]) -> str:
    return next(item.partition("=")[2] for item in overrides if item.startswith("runs@run="))


def _select_runs(
    run: str | None, values: dict[str, str], config_dir: Path, multirun: bool, problems: list[str]
) -> list[str]:
    if not run:
        problems.append(f"run is missing; give run=<run_id>, one of: {', '.join(known_run_ids(config_dir))}")
        return []
    run_ids = run.split(",") if multirun else [run]
    files = []
    for run_id in run_ids:
        file_id, seed = split_run_id(run_id, config_dir, problems)
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
    return [f"runs@run={','.join(files)}"]


def split_run_id(run_id: str, config_dir: Path, problems: list[str]) -> tuple[str, int | None]:
    """(file, seed) that a run id names; ``<file>-s<N>`` is the file with seed N. Adds to ``problems`` what is wrong."""
    known = known_run_ids(config_dir)
    if run_id in known:
        if not _parses(f"runs@run={run_id}") or run_id.isdigit() or run_id.lower() in ("true", "false", "null"):
            problems.append(f"run={run_id}: rename the file; run ids take letters, digits, '.', '_' and '-'")
        return run_id, None
    with_seed = re.fullmatch(r"(.+)-s(0|[1-9][0-9]*)", run_id)
    if with_seed and with_seed.group(1) in known:
        return with_seed.group(1), int(with_seed.group(2))
    if re.search(r"[/\\]", run_id) or run_id in (".", ".."):
        problems.append(f"run={run_id}: a run id names a file of config/runs and holds no path separator")
        return run_id, None
    near = difflib.get_close_matches(run_id, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    problems.append(f"run={run_id}: unknown run id; {hint}known: {', '.join(known) or 'none'}")
    return run_id, None


def _as_override(key: str, value: str, multirun: bool, problems: list[str]) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    cleared = value == "null" and key.endswith("revision")
    if (key in TEXT_KEYS or key in text_keys()) and not quoted and not cleared and not (multirun and "," in value):
        value = _quote(value)
    override = f"++{key}={value}"
    if _parses(override):
        return override
    override = f"++{key}={_quote(value)}"
    if not _parses(override):
        problems.append(f"{key}={value}: not a value that Hydra can read; quote it")
    return override


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'") if value.endswith("\\") else value.replace("'", "\\'")
    return f"'{escaped}'"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
