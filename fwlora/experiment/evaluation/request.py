"""Command line of ``src.evaluate``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fwlora.experiment.errors import UserError, describe_validation_error
from fwlora.experiment.evaluation.compare.cells import PairChoice
from fwlora.experiment.evaluation.compare.variants import known_roles
from fwlora.experiment.files import load_yaml
from fwlora.experiment.paths import RESULTS_VARIABLE, expand_home
from fwlora.experiment.settings.schema import FORBIDDEN_IN_RUN_IDS, LONGEST_RUN_ID
from fwlora.experiment.tracking import (
    DEFAULT_TRACKER,
    SourceChoice,
    TrackerSettings,
    environment_defaults,
    known_trackers,
)

COMPARISON_FOLDER = "comparison"
PLAIN_KEYS = ("results_dir", "run_ids", "source", "tracker", "reference", "pairs")
_BARE_ID = r"(?:'[\w.-]+'|[\w.-]+)"
BARE_LIST = re.compile(rf"\[\s*{_BARE_ID}(?:\s*,\s*{_BARE_ID})*\s*\]")
SOURCES: tuple[SourceChoice, ...] = get_args(SourceChoice)
USAGE = """\
usage: python -m src.evaluate results_dir=<dir> run_ids='["a","b"]'
                              [source=auto|api|files] [tracker={trackers}]{tracker_keys}
                              [reference=<role>] [pairs=reference|all]

  results_dir  where runs left their tracker's files, and where results go (empty: as in config/config.yaml)
  run_ids      JSON list of the runs to evaluate
  source       files: the tracker's files under results_dir; api: its server; auto: files, else the server
  tracker      what recorded the runs (default: as in config/config.yaml)
  reference    the method that every other one is compared with: {roles} (default: lora)
  pairs        reference: those pairs, and FW-LoRA with each other method; all: every pair"""


@dataclass(frozen=True)
class EvaluationRequest:
    """A parsed command line of ``src.evaluate``.

    Attributes:
        results_dir: where runs left files, and where results are written.
        run_ids: of the runs to evaluate.
        source: whether records are read from files, a service or both.
        tracker_settings: of the tracker that recorded the runs.
        pairs: which pairs of methods are compared.
    """

    results_dir: Path
    run_ids: tuple[str, ...]
    source: SourceChoice
    tracker_settings: TrackerSettings
    pairs: PairChoice


def usage() -> str:
    """Return the help text."""
    keys = "".join(f" [{key}=<value>]" for key in _tracker_keys())
    roles = ", ".join(known_roles())
    return USAGE.format(trackers="|".join(known_trackers()), tracker_keys=keys, roles=roles)


def parse_request(arguments: Sequence[str], environment: Mapping[str, str], config_path: Path) -> EvaluationRequest:
    """Read ``key=value`` arguments; take missing or empty ones from the environment, then from ``config_path``.

    Args:
        arguments: of the command line.
        environment: variables by name.
        config_path: the YAML file with defaults.

    Raises:
        UserError: everything that is wrong with the arguments, at once.
    """
    given, problems = _split_arguments(arguments, (*PLAIN_KEYS, *_tracker_keys()))
    if "results_dir" not in given:
        problems.append("results_dir is missing; give results_dir=<dir>")
    run_ids, found = _parse_run_ids(given.get("run_ids"))
    problems += found
    source = given.get("source", "auto")
    if source not in SOURCES:
        problems.append(f"source is {source!r}; one of {', '.join(SOURCES)} is expected")
    reference, pairs = given.get("reference", PairChoice.reference), given.get("pairs", "reference")
    if reference not in known_roles():
        problems.append(f"reference is {reference!r}; one of {', '.join(known_roles())} is expected")
    if pairs not in ("reference", "all"):
        problems.append(f"pairs is {pairs!r}; one of reference, all is expected")
    results_dir, tracker_settings, found = _complete(given, environment, config_path)
    problems += found
    if problems or tracker_settings is None:
        raise UserError.collect("command line", problems)
    choice = PairChoice(reference, every=pairs == "all")
    folder = expand_home(results_dir)
    return EvaluationRequest(folder, run_ids, cast(SourceChoice, source), tracker_settings, choice)


def _split_arguments(arguments: Sequence[str], known_keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return values by key, and what is wrong with the arguments."""
    given: dict[str, str] = {}
    problems = []
    for argument in _join_split_list(arguments):
        key, separator, value = argument.partition("=")
        if not separator:
            problems.append(f"{argument!r} is not of the form key=value")
        elif key not in known_keys:
            problems.append(f"{key!r} is unknown; known: {', '.join(known_keys)}")
        elif key in given:
            problems.append(f"{key} is given twice: {given[key]!r} and {value!r}")
        else:
            given[key] = value
    return given, problems


def _join_split_list(arguments: Sequence[str]) -> Iterator[str]:
    """Yield arguments; a list of run ids that a shell split at its spaces, as one again."""
    rest = iter(arguments)
    for argument in rest:
        while argument.startswith("run_ids=[") and "]" not in argument:
            following = next(rest, None)
            if following is None:
                break
            argument = f"{argument} {following}"
        yield argument


def _tracker_keys() -> list[str]:
    """Return the settings of trackers that reading needs."""
    return [f"{name}.{field}" for name, settings in known_trackers().items() for field in settings.source_fields]


def _parse_run_ids(text: str | None) -> tuple[tuple[str, ...], list[str]]:
    """Return the run ids of a JSON list, and what is wrong with it."""
    example = """run_ids='["a","b"]'"""
    if text is None:
        return (), [f"run_ids is missing; give {example}"]
    try:
        parsed = _parse_quoted(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting that Python refuses
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        return (), [f"run_ids={_shorten(text)} is not JSON ({reason}); give {example}"]
    if not isinstance(parsed, list) or not all(isinstance(item, str) for item in parsed):
        return (), [f"run_ids={_shorten(text)} is not a JSON list of strings; give {example}"]
    run_ids: list[str] = parsed
    problems = [] if run_ids else [f"run_ids is empty; give {example}"]
    for run_id in dict.fromkeys(run_ids):
        if run_ids.count(run_id) > 1:
            problems.append(f"run_ids names {run_id!r} {run_ids.count(run_id)} times; name it once")
        if FORBIDDEN_IN_RUN_IDS & set(run_id) or run_id in ("", ".", ".."):
            problems.append(f"run_ids: {run_id!r} is no run id: it must be a plain file name without separators")
        elif len(run_id.encode(errors="replace")) > LONGEST_RUN_ID:
            problems.append(f"run_ids: {_shorten(run_id)!r} is longer than {LONGEST_RUN_ID} bytes and no run's id")
        elif run_id == COMPARISON_FOLDER:
            problems.append(f"run_ids: {run_id!r} is the folder of the comparison and cannot be a run id")
    return tuple(run_ids), problems


def _parse_quoted(text: str) -> object:
    """Parse JSON that a shell's or a workflow's quoting may have changed.

    That is JSON in a string of JSON, a pair of quotes around the whole, quotes behind backslashes, single quotes in
    place of double ones, and a list that lost its quotes: ``[a, b]``, where ids hold no space and no comma.

    Raises:
        ValueError: it is none of them; what is wrong with it as JSON.
        RecursionError: it is nested too deep.
    """
    try:
        parsed: object = json.loads(text)
    except ValueError as error:
        within = text.strip()
        if len(within) > 1 and within[0] == within[-1] and within[0] in "'\"":
            return _parse_quoted(within[1:-1])
        if '\\"' in within:
            return _parse_quoted(within.replace('\\"', '"'))
        if not BARE_LIST.fullmatch(within):
            raise error from None
        return [item.strip().strip("'") for item in within[1:-1].split(",")]
    return _parse_quoted(parsed) if isinstance(parsed, str) and parsed.strip().startswith("[") else parsed


def _shorten(text: str) -> str:
    """Return a text for a message: its start, where it is long."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _complete(
    given: Mapping[str, str], environment: Mapping[str, str], config_path: Path
) -> tuple[str, TrackerSettings | None, list[str]]:
    """Return the folder of the results and the tracker's settings, or what is wrong with them."""
    variables = {"results_dir": RESULTS_VARIABLE, **environment_defaults()}
    # An empty `results_dir=`, as a pipeline with an unset variable passes it, means the configured default.
    values = {key: given.get(key) or environment.get(variables.get(key, "")) for key in ("results_dir", "tracker")}
    configured, reason = _read_configured(("results_dir", "tracker", *_tracker_keys()), config_path)
    tracker = values["tracker"] or configured.get("tracker") or DEFAULT_TRACKER
    settings_class = known_trackers().get(tracker)
    if settings_class is None:
        return "", None, [f"tracker is {tracker!r}; one of {', '.join(known_trackers())} is expected"]
    fields = {f"{tracker}.{field}": settings_class.model_fields[field] for field in settings_class.source_fields}
    for key in fields:
        values[key] = given.get(key) or environment.get(variables.get(key, ""))
    missing = [key for key, value in values.items() if not value and key != "tracker"]
    required = [key for key in missing if key not in fields or fields[key].is_required()]
    if required and reason:
        return "", None, [f"{config_path} {reason}; give {' and '.join(f'{key}=<value>' for key in required)}"]
    values.update({key: configured[key] for key in missing if configured.get(key)})
    unset = [key for key in required if not values[key]]
    if unset:
        return "", None, [f"{key} is not set; give {key}=<value>, or set it in {config_path}" for key in unset]
    node = {
        key.partition(".")[2]: value if field.annotation is str else _parse_value(value)
        for key, field in fields.items()
        if (value := values[key]) is not None
    }
    try:
        return str(values["results_dir"]), settings_class.model_validate(node), []
    except ValidationError as error:
        return "", None, [f"{tracker}.{line}" for line in describe_validation_error(error, settings_class)]


def _parse_value(text: str) -> object:
    try:
        parsed: object = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # which validation refuses
    return parsed


def _read_configured(keys: Sequence[str], config_path: Path) -> tuple[dict[str, str], str]:
    """Return the values that a configuration file sets as text, and why it cannot be read (empty: it can)."""
    try:
        config = load_yaml(config_path)
        selected = {key: OmegaConf.select(config, key) for key in keys}
    except OmegaConfBaseException as error:
        return {}, f"cannot be read: {str(error).splitlines()[0]}"
    except ValueError as error:
        return {}, str(error)
    return {key: str(value) for key, value in selected.items() if value is not None}, ""
