"""What is recorded of a run, and where.

The setting ``tracker=<name>`` chooses the tracker, in ``src.main`` and ``src.evaluate`` alike; the default is
``wandb``. Each tracker has one settings node of its own name, such as ``wandb.mode=offline``.

To add a tracker, write a subclass of :class:`TrackerSettings` and register it; nothing else changes::

    class FolderSettings(TrackerSettings):
        environment = {"path": "RUN_FOLDER"}      # RUN_FOLDER=/data sets folder.path
        source_fields = ("path",)                 # src.evaluate ... tracker=folder folder.path=/data
        path: str = "records"

        def open_tracker(self, *, run_id, config, directory):
            return FolderTracker(Path(self.path) / run_id, config)        # a Tracker

        def open_source(self, *, results_dir, source):
            return FolderSource(Path(self.path))                          # a RecordSource

    register_tracker("folder", FolderSettings)

A module named under the entry point group ``fwlora`` is imported when a program starts, see
:mod:`fwlora.experiment.plugins`.
"""

from importlib import import_module

from fwlora.experiment.tracking.registry import (
    DEFAULT_TRACKER,
    SourceChoice,
    TrackerSettings,
    environment_defaults,
    known_trackers,
    open_source,
    open_tracker,
    project_keys,
    register_tracker,
    text_keys,
    unregister_tracker,
)
from fwlora.experiment.tracking.tracker import NullTracker, RecordSource, Tracker

__all__ = [
    "DEFAULT_TRACKER",
    "NullTracker",
    "RecordSource",
    "SourceChoice",
    "Tracker",
    "TrackerSettings",
    "environment_defaults",
    "known_trackers",
    "open_source",
    "open_tracker",
    "project_keys",
    "register_tracker",
    "text_keys",
    "unregister_tracker",
]

# Each of these packages registers a tracker; before any other code can, so that no other takes its name.
for _package in ("wandb",):
    import_module(f"{__name__}.{_package}")
