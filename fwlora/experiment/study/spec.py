"""What a study is: its file, the runs that it plans, and their evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from fwlora.experiment.errors import UserError, collecting
from fwlora.experiment.files import read_model
from fwlora.experiment.paths import find_log
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.tracking import project_keys


class StudyRun(BaseModel):
    """An entry of ``runs`` with arguments of its own, which win over the study's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    run: str
    overrides: list[str] = Field(default_factory=list)


class StudySpec(BaseModel):
    """A file of ``config/study``.

    Attributes:
        results_dir: where runs and their comparison go, from the repository's root.
        runs: run ids, or a run id with overrides.
        seeds: every run is made with each of them; null keeps the files' own.
        overrides: further arguments of every run, e.g. ``run.optuna.n_trials=0``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    results_dir: str = Field(min_length=1)
    runs: list[str | StudyRun] = Field(min_length=1)
    seeds: list[int] | None = None
    overrides: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        run_id: the id that it will have.
        results_dir: where it goes, from the repository's root.
        mode: of ``src.main``.
        arguments: of ``src.main``.
        source_arguments: of ``src.evaluate``, where the run's arguments say how its record is read.
    """

    run_id: str
    results_dir: str
    mode: str
    arguments: list[str]
    source_arguments: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """The log that ``src.main`` writes, from the repository's root."""
        return find_log(self.results_dir, self.run_id, self.mode)


@dataclass(frozen=True)
class PlannedEvaluation:
    """The evaluation of all runs of a folder.

    Attributes:
        results_dir: where results go, from the repository's root.
        arguments: of ``src.evaluate``.
    """

    results_dir: str
    arguments: list[str]


def known_studies(config_dir: Path) -> list[str]:
    """Return the names of the files in ``config/study``."""
    return sorted(path.stem for path in (config_dir / "study").glob("*.yaml"))


def load_study(name: str, config_dir: Path) -> StudySpec:
    """Read the study of a name.

    Raises:
        UserError: an unknown name, or a file with unknown keys or wrong types, all at once.
    """
    if name not in known_studies(config_dir):
        raise UserError(f"study {name!r} is unknown; config/study has {', '.join(known_studies(config_dir)) or 'none'}")
    return read_model(config_dir / "study" / f"{name}.yaml", StudySpec, f"config/study/{name}.yaml")


def plan_study(
    study: StudySpec, config_dir: Path, environment: Mapping[str, str], extra_overrides: Sequence[str] = ()
) -> list[PlannedRun]:
    """Plan every run of a study, seeds outermost, each checked before the first one starts.

    Args:
        study: the file's content.
        config_dir: the folder that holds ``runs/``.
        environment: variables by name.
        extra_overrides: further arguments of every run, which win over the file's.

    Raises:
        UserError: runs whose arguments are refused, runs that are planned twice, and folders with records of different
            trackers, all at once.
    """
    planned: list[PlannedRun] = []
    seeds: list[int | None] = list(study.seeds) if study.seeds else [None]
    with collecting("study") as problems:
        for seed in seeds:
            for entry in study.runs:
                run, own = (entry, []) if isinstance(entry, str) else (entry.run, entry.overrides)
                seed_override = [] if seed is None else [f"run.training.seed={seed}"]
                given = [f"run={run}", f"results_dir={study.results_dir}", "mode=full", *seed_override]
                given += [*study.overrides, *own, *extra_overrides]
                # Of two values for one key the later counts.
                arguments = list({item.partition("=")[0]: item for item in given}.values())
                try:
                    planned.append(_plan_run(arguments, compose_settings(arguments, config_dir, environment)))
                except UserError as error:
                    problems.append(str(error))
        ids = [run.run_id for run in planned]
        problems += [
            f"{run_id} is planned {ids.count(run_id)} times" for run_id in sorted(set(ids)) if ids.count(run_id) > 1
        ]
        for results_dir, sources in _group_sources(planned).items():
            if len(sources) > 1:
                shown = " and ".join(" ".join(source) or "the configured tracker" for source in sources)
                problems.append(
                    f"runs in {results_dir} are recorded in different places ({shown}); give each its results_dir"
                )
    return planned


def plan_evaluations(planned: Sequence[PlannedRun]) -> list[PlannedEvaluation]:
    """Plan an evaluation for each folder of results; trial runs have no records and are left out."""
    return [
        PlannedEvaluation(results_dir, [f"results_dir={results_dir}", f"run_ids={json.dumps(run_ids)}", *source])
        for results_dir, sources in _group_sources(planned).items()
        for source, run_ids in sources.items()
    ]


def _plan_run(arguments: list[str], settings: ProgramSettings) -> PlannedRun:
    keys = {argument.partition("=")[0] for argument in arguments}
    keys |= set(project_keys()) if get_mode(settings.mode).project_suffix else set()
    tracker, node = settings.tracker, settings.tracker_settings
    source = [f"tracker={tracker}"] if "tracker" in keys else []
    source += [
        f"{tracker}.{field}={getattr(node, field)}" for field in node.source_fields if f"{tracker}.{field}" in keys
    ]
    return PlannedRun(settings.run.run_id, settings.results_dir, settings.mode, arguments, tuple(source))


def _group_sources(planned: Sequence[PlannedRun]) -> dict[str, dict[tuple[str, ...], list[str]]]:
    """Return the ids of recorded runs by folder of results and source of the records."""
    groups: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for run in planned:
        if get_mode(run.mode).is_recorded:
            groups.setdefault(run.results_dir, {}).setdefault(run.source_arguments, []).append(run.run_id)
    return groups
