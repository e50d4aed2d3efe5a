"""Command line of ``src.evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fwlora.experiment.errors import UserError, describe_yaml_error
from fwlora.experiment.settings.schema import FORBIDDEN_IN_RUN_IDS

COMPARISON_FOLDER = "comparison"
Source = Literal["auto", "api", "files"]
USAGE = """\
usage: python -m src.evaluate results_dir=<dir> run_ids='["a","b"]'
                              [source=auto|api|files] [wandb.entity=<name>] [wandb.project=<name>]

  results_dir  where runs left W&B's offline files, and where results go (empty: as in config/config.yaml)
  run_ids      JSON list of the runs to evaluate
  source       files: W&B's offline files under results_dir; api: the W&B server; auto: files, else the server"""

_ENVIRONMENT = {"wandb.entity": "WANDB_ENTITY", "wandb.project": "WANDB_PROJECT"}
_KEYS = ("results_dir", "run_ids", "source", *_ENVIRONMENT)
# An empty `results_dir=`, as a pipeline with an unset variable passes it, means the configured default.
_CONFIGURED = ("results_dir", *_ENVIRONMENT)


@dataclass(frozen=True)
class EvaluationRequest:
    """A parsed command line of ``src.evaluate``.

    Attributes:
        results_dir: where runs left files, and where results are written.
        run_ids: of the runs to evaluate.
        source: where records are read.
        entity: W&B user or team.
        project: W&B project.
    """

    results_dir: Path
    run_ids: tuple[str, ...]
    source: Source
    entity: str
    project: str


def parse_request(arguments: Sequence[str], environment: Mapping[str, str], config_path: Path) -> EvaluationRequest:
    """Read ``key=value`` arguments; take missing or empty ones from the environment, then from ``config_path``.

    Args:
        arguments: of the command line.
        environment: variables by name.
        config_path: the YAML file with defaults.

    Raises:
        UserError: everything that is wrong with the arguments, at once.
    """
    problems: list[str] = []
    given: dict[str, str] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator:
            problems.append(f"{argument!r} is not of the form key=value")
        elif key not in _KEYS:
            problems.append(f"{key!r} is unknown; known: {', '.join(_KEYS)}")
        elif key in given:
            problems.append(f"{key} is given twice: {given[key]!r} and {value!r}")
        else:
            given[key] = value
    if "results_dir" not in given:
        problems.append("results_dir is missing; give results_dir=<dir>")
    run_ids = _parse_run_ids(given.get("run_ids"), problems)
    source = given.get("source", "auto")
    if source not in get_args(Source):
        problems.append(f"source is {source!r}; one of {', '.join(get_args(Source))} is expected")
    configured = _complete(given, environment, config_path, problems)
    if problems:
        raise UserError.collect("command line", problems)
    return EvaluationRequest(
        results_dir=Path(configured["results_dir"]),
        run_ids=run_ids,
        source=cast(Source, source),
        entity=configured["wandb.entity"],
        project=configured["wandb.project"],
    )


def _parse_run_ids(text: str | None, problems: list[str]) -> tuple[str, ...]:
    example = """run_ids='["a","b"]'"""
    if text is None:
        problems.append(f"run_ids is missing; give {example}")
        return ()
    try:
        parsed: Any = json.loads(text)
    except json.JSONDecodeError as error:
        problems.append(f"run_ids={text} is not JSON ({error}); give {example}")
        return ()
    if not isinstance(parsed, list) or not all(isinstance(item, str) for item in parsed):
        problems.append(f"run_ids={text} is not a JSON list of strings; give {example}")
        return ()
    if not parsed:
        problems.append(f"run_ids is empty; give {example}")
    for run_id in dict.fromkeys(parsed):
        if parsed.count(run_id) > 1:
            problems.append(f"run_ids names {run_id!r} {parsed.count(run_id)} times; name it once")
        if FORBIDDEN_IN_RUN_IDS & set(run_id) or run_id in ("", ".", ".."):
            problems.append(f"run_ids: {run_id!r} is no run id: it must be a plain file name without separators")
        elif run_id == COMPARISON_FOLDER:
            problems.append(f"run_ids: {run_id!r} is the folder of the comparison and cannot be a run id")
    return tuple(parsed)


def _complete(
    given: Mapping[str, str], environment: Mapping[str, str], config_path: Path, problems: list[str]
) -> dict[str, str]:
    values = {key: given.get(key) or environment.get(_ENVIRONMENT.get(key, "")) for key in _CONFIGURED}
    missing = [key for key, value in values.items() if not value]
    if missing:
        try:
            config = OmegaConf.load(config_path)
            values.update({key: OmegaConf.select(config, key) for key in missing})
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            problems.append(f"{config_path}: cannot read {' and '.join(missing)}: {describe_yaml_error(error)}")
            return {}
    for key in missing:
        if not values[key]:
            problems.append(f"{key} is not set; give {key}=<value>, or set it in {config_path}")
    return {key: str(value) for key, value in values.items()}
