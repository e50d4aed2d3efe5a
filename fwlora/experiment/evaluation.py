"""Evaluation as a whole: command line to request, records to files in memory, files to disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fwlora.experiment import comparison, comparison_figures, figures, tables
from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluated_runs import read_runs
from fwlora.experiment.records import RunRecord
from fwlora.experiment.settings import FORBIDDEN_IN_RUN_IDS

COMPARISON_FOLDER = "comparison"
Source = Literal["auto", "api", "files"]
RNG_SEED = 20_261_121
USAGE = """\
usage: python -m src.evaluate results_dir=<dir> run_ids='["a","b"]'
                              [source=auto|api|files] [wandb.entity=<name>] [wandb.project=<name>]

  results_dir  where runs left W&B's offline files, and where results go (empty: as in config/config.yaml)
  run_ids      JSON list of the runs to evaluate
  source       files: W&B's offline files under results_dir; api: the W&B server; auto: files, else the server"""

_ENVIRONMENT = {"wandb.entity": "WANDB_ENTITY", "wandb.project": "WANDB_PROJECT"}
_KEYS = ("results_dir", "run_ids", "source", *_ENVIRONMENT)
# A pipeline that lost its variable passes `results_dir=`; the configured default is what it meant.
_CONFIGURED = ("results_dir", *_ENVIRONMENT)


@dataclass(frozen=True)
class EvaluationRequest:
    """What ``src.evaluate`` was asked for."""

    results_dir: Path
    run_ids: tuple[str, ...]
    source: Source
    entity: str
    project: str


@dataclass(frozen=True)
class Evaluation:
    """Everything evaluation produces, before any of it is written.

    Attributes:
        summary: text for the terminal: the table of results and the warnings.
        files: contents by path, runs' files first, then the comparison's.
    """

    summary: str
    files: Mapping[Path, bytes]


def parse_request(arguments: Sequence[str], environment: Mapping[str, str], config_path: Path) -> EvaluationRequest:
    """Read ``key=value`` arguments; what is empty or missing: from the environment, then from ``config_path``.

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


def collect_records(load: Callable[[Sequence[str]], list[RunRecord]], run_ids: Sequence[str]) -> list[RunRecord]:
    """Records of all runs; where some cannot be read, what is wrong with the others is reported with them.

    Args:
        load: reads records; names each run that it cannot read as `` `<run_id>`: reason `` in its UserError.
        run_ids: what to read.

    Raises:
        UserError: runs that cannot be read, and runs that could be but cannot be compared.
    """
    try:
        return load(run_ids)
    except UserError as error:
        message = str(error)
        readable = [run_id for run_id in run_ids if f"`{run_id}`:" not in message]
        if len(readable) in (0, len(run_ids)):
            raise
        try:
            read_runs(load(readable))
        except UserError as other:
            message += f"\n{other}"
        raise UserError(message) from None


def evaluate_records(records: Sequence[RunRecord], results_dir: Path, rng_seed: int = RNG_SEED) -> Evaluation:
    """Check, compare and draw; equal records give byte-equal files.

    Args:
        records: one per run, in the order in which their files are to be listed.
        results_dir: prefix of all paths; nothing is read from or written to it.
        rng_seed: of all resampling.

    Raises:
        UserError: runs that cannot be compared, all of them named.
    """
    runs = read_runs(records)
    cells = comparison.group_cells(runs)
    warnings = comparison.find_warnings(cells)
    statistics = comparison.compare_pairs(cells, rng_seed)
    files: dict[Path, bytes] = {}
    for run in runs:
        folder = results_dir / run.run_id
        files[folder / "metrics.json"] = tables.to_json(tables.describe_run(run))
        files[folder / "history.json"] = tables.to_json(tables.describe_history(run))
        files.update({folder / name: content for name, content in figures.draw_run(run).items()})
    folder = results_dir / COMPARISON_FOLDER
    files[folder / "aggregated_metrics.json"] = tables.to_json(comparison.aggregate(cells, warnings))
    files[folder / "statistics.json"] = tables.to_json(statistics)
    files[folder / "comparison_table.md"] = tables.render_markdown(cells, statistics, warnings).encode()
    files[folder / "comparison_table.csv"] = tables.render_csv(cells).encode()
    files.update(
        {folder / name: content for name, content in comparison_figures.draw_comparison(cells, statistics).items()}
    )
    summary = [tables.render_text_table(cells), *(f"warning: {warning}" for warning in warnings)]
    return Evaluation("\n".join(summary), files)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, then rename them all: what cannot be written leaves the rest as it was.

    Raises:
        UserError: a folder or file that cannot be written.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporaries[path].write_bytes(content)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"results_dir: cannot write {path}: {reason}; give a writable results_dir=<dir>") from None
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()


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
            problems.append(f"{config_path}: cannot read {' and '.join(missing)}: {str(error).splitlines()[0]}")
            return {}
    for key in missing:
        if not values[key]:
            problems.append(f"{key} is not set; give {key}=<value>, or set it in {config_path}")
    return {key: str(value) for key, value in values.items()}
