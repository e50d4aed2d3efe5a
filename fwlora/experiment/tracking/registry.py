"""The seam for trackers: the settings class of one says how runs are recorded and read; and the registry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from fwlora.experiment.settings.base import SettingsNode
from fwlora.experiment.tracking.records import RunRecord
from fwlora.experiment.tracking.tracker import NullTracker, Tracker, check_entries

if TYPE_CHECKING:
    from fwlora.experiment.evaluation.request import EvaluationRequest
    from fwlora.experiment.settings.schema import ProgramSettings

DEFAULT_TRACKER = "wandb"
# files: what a tracker left under `results_dir`; api: its service; auto: files, and the service for what they lack.
Source = Literal["auto", "api", "files"]

_BUILT_IN = ("wandb",)
_RESERVED = ("run", "runs", "results_dir", "mode", "engine", "tracker", "hydra", "run_ids", "source")
_TRACKERS: dict[str, type[TrackerSettings]] = {}


class RecordSource(Protocol):
    """A place where recorded runs are read."""

    def load(self, run_ids: Sequence[str]) -> list[RunRecord]:
        """Read runs, in the order of their ids.

        Raises:
            UnreadableRunsError: some runs cannot be read; it gives a reason for each of them.
        """


class TrackerSettings(SettingsNode):
    """The settings node of a tracker, which is named like the tracker, and what the tracker does.

    Attributes:
        environment: field -> environment variable that sets it where the command line does not.
        source_fields: the fields that reading needs; ``src.evaluate`` accepts these.
    """

    environment: ClassVar[Mapping[str, str]] = {}
    source_fields: ClassVar[tuple[str, ...]] = ()

    def limit_to_trial(self) -> Self:
        """Return the settings that a trial shows; whatever they are, a trial is not recorded."""
        return self

    @abstractmethod
    def start(self, *, run_id: str, config: Mapping[str, Any], directory: Path) -> Tracker:
        """Start to record a run.

        Args:
            run_id: id of the run; a run that was recorded under it before is continued.
            config: first config entries, as values of JSON; floats may be non-finite.
            directory: of the run, for files; it may not exist.

        Raises:
            UserError: the run cannot be recorded.
        """

    @abstractmethod
    def find_source(self, *, results_dir: Path, source: Source) -> RecordSource:
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
        ValueError: another tracker or another setting has the name.
    """
    if name in _RESERVED or not name.isidentifier():
        raise ValueError(f"`name` {name!r} cannot name a settings node: an identifier not in {_RESERVED} is needed")
    if _TRACKERS.get(name, settings_class) is not settings_class:
        raise ValueError(f"`name` {name!r} is taken by {_TRACKERS[name].__name__}; choose another")
    _TRACKERS[name] = settings_class


def unregister_tracker(name: str) -> None:
    """Remove a tracker, if it is registered."""
    _TRACKERS.pop(name, None)


def known_trackers() -> dict[str, type[TrackerSettings]]:
    """Return the settings class of every registered tracker by name, the built-in ones first."""
    for package in _BUILT_IN:
        import_module(f"fwlora.experiment.tracking.{package}")
    return dict(_TRACKERS)


def environment_defaults() -> dict[str, str]:
    """Return the settings that environment variables set: key, such as ``wandb.mode`` -> variable."""
    return {
        f"{name}.{field}": variable
        for name, settings_class in known_trackers().items()
        for field, variable in settings_class.environment.items()
    }


def text_keys() -> set[str]:
    """Return the keys of trackers whose values are text whatever they look like."""
    return {
        f"{name}.{field}"
        for name, settings_class in known_trackers().items()
        for field, info in settings_class.model_fields.items()
        if info.annotation is str
    }


def open_tracker(
    settings: ProgramSettings, *, run_id: str, config: Mapping[str, Any], directory: Path
) -> Tracker:
    """Start to record a run with the tracker that the settings choose; a trial is checked, not recorded.

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
    if settings.mode == "trial":
        return NullTracker()
    return settings.tracker_settings.start(run_id=run_id, config=entries, directory=directory)


def open_source(request: EvaluationRequest) -> RecordSource:
    """Return where the tracker that the command line chooses keeps the recorded runs."""
    return request.tracker_settings.find_source(results_dir=request.results_dir, source=request.source)
