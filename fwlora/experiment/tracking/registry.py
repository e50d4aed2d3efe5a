"""The seam for trackers: a settings class that opens a tracker and a source of records, and the registry of these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.settings.base import SettingsNode
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.tracking.tracker import NullTracker, RecordSource, Tracker, check_entries

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import ProgramSettings

DEFAULT_TRACKER = "wandb"
# files: what a tracker left under `results_dir`; api: its service; auto: files, and the service for what they lack.
SourceChoice = Literal["auto", "api", "files"]

_RESERVED = (
    "run",
    "runs",
    "results_dir",
    "mode",
    "engine",
    "tracker",
    "resume",
    "hydra",
    "defaults",
    "run_ids",
    "source",
)
_TRACKERS: dict[str, type[TrackerSettings]] = {}


class TrackerSettings(SettingsNode):
    """The settings node of a tracker, which is named like the tracker, and what the tracker does.

    Attributes:
        environment: field -> environment variable that sets it where the command line does not.
        source_fields: the fields that reading needs; ``src.evaluate`` accepts these.
        project_field: the field that keeps runs apart; modes such as ``pilot`` add a suffix to its value.
    """

    environment: ClassVar[Mapping[str, str]] = {}
    source_fields: ClassVar[tuple[str, ...]] = ()
    project_field: ClassVar[str | None] = None

    def limit_to_trial(self) -> Self:
        """Return the settings of a trial, which is not recorded whatever they say."""
        return self

    @abstractmethod
    def open_tracker(self, *, run_id: str, config: JsonMapping, directory: Path) -> Tracker:
        """Start to record a run.

        Args:
            run_id: id of the run; a run that was recorded under it before is continued.
            config: first config entries, as values of JSON; floats may be non-finite.
            directory: of the run, for files; it may not exist.

        Raises:
            UserError: the run cannot be recorded.
        """

    @abstractmethod
    def open_source(self, *, results_dir: Path, source: SourceChoice) -> RecordSource:
        """Return where runs are read.

        Args:
            results_dir: holds the directory of each run, named by its id.
            source: files, service or both; a tracker that has one of them ignores it.
        """


def register_tracker(name: str, settings_class: type[TrackerSettings]) -> None:
    """Add a tracker.

    Args:
        name: the value of the setting ``tracker``, and the name of the tracker's settings node.
        settings_class: of the node.

    Raises:
        ValueError: another tracker or another setting has the name, or it is no identifier.
    """
    if name in _RESERVED or not name.isidentifier():
        raise ValueError(
            f"`name` {name!r} cannot name a tracker's settings; choose an identifier other than {', '.join(_RESERVED)}"
        )
    if _TRACKERS.get(name, settings_class) is not settings_class:
        raise ValueError(f"`name` {name!r} is taken by {_TRACKERS[name].__name__}; choose another")
    _TRACKERS[name] = settings_class


def unregister_tracker(name: str) -> None:
    """Remove a tracker, if it is registered."""
    _TRACKERS.pop(name, None)


def known_trackers() -> dict[str, type[TrackerSettings]]:
    """Return the settings class of every registered tracker by name, the built-in one first."""
    return dict(_TRACKERS)


def environment_defaults() -> dict[str, str]:
    """Return the settings that environment variables set: key, such as ``wandb.mode`` -> variable."""
    return {
        f"{name}.{field}": variable
        for name, settings_class in _TRACKERS.items()
        for field, variable in settings_class.environment.items()
    }


def project_keys() -> list[str]:
    """Return the settings that keep the runs of a mode apart from others, such as ``wandb.project``."""
    return [f"{name}.{node.project_field}" for name, node in _TRACKERS.items() if node.project_field]


def text_keys() -> set[str]:
    """Return the keys of trackers' settings whose values are text whatever they look like."""
    return {
        f"{name}.{field}"
        for name, settings_class in _TRACKERS.items()
        for field, info in settings_class.model_fields.items()
        if info.annotation is str
    }


def open_tracker(settings: ProgramSettings, *, run_id: str, config: JsonMapping, directory: Path) -> Tracker:
    """Start to record a run with the tracker that the settings choose; a mode that is not recorded is checked alone.

    Args:
        settings: of the program.
        run_id: id of the run.
        config: first config entries.
        directory: of the run, for the tracker's files.

    Raises:
        UserError: the run cannot be recorded.
        ValueError: ``config`` holds what JSON has no type for.
    """
    entries = check_entries(config)
    if not get_mode(settings.mode).is_recorded:
        return NullTracker()
    return settings.tracker_settings.open_tracker(run_id=run_id, config=entries, directory=directory)


def open_source(settings: TrackerSettings, *, results_dir: Path, source: SourceChoice = "auto") -> RecordSource:
    """Return where a tracker's records are read.

    Args:
        settings: of the tracker.
        results_dir: holds the directory of each run.
        source: files, service or both.

    Raises:
        UserError: an unknown ``source``.
    """
    if source not in get_args(SourceChoice):
        raise UserError(f"`source` is {source!r}; it must be auto, api or files")
    return settings.open_source(results_dir=results_dir, source=source)
