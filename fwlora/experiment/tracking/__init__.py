"""What is recorded of a run, and where.

The setting ``tracker=<name>`` chooses the tracker, in ``src.main`` and ``src.evaluate`` alike; the default is
``wandb``. Each tracker has one settings node of its own name, such as ``wandb.mode=offline``.

To add a tracker, write a subclass of :class:`TrackerSettings` and register it; nothing else changes::

    class FolderSettings(TrackerSettings):
        environment = {"folder": "RUN_FOLDER"}      # RUN_FOLDER=/data sets folder.folder
        source_fields = ("folder",)                 # src.evaluate ... tracker=folder folder.folder=/data
        folder: str = "records"

        def start(self, *, run_id, config, directory):           # returns a Tracker
            return FolderTracker(Path(self.folder) / run_id, config)

        def find_source(self, *, results_dir, source):           # returns a RecordSource
            return FolderSource(Path(self.folder))

    register_tracker("folder", FolderSettings)

A module named under the entry point group ``fwlora`` is imported at the start, see
:mod:`fwlora.experiment.plugins`.
"""

from fwlora.experiment.tracking.registry import (
    RecordSource,
    TrackerSettings,
    known_trackers,
    open_source,
    open_tracker,
    register_tracker,
    unregister_tracker,
)
from fwlora.experiment.tracking.tracker import NullTracker, Tracker

__all__ = [
    "NullTracker",
    "RecordSource",
    "Tracker",
    "TrackerSettings",
    "known_trackers",
    "open_source",
    "open_tracker",
    "register_tracker",
    "unregister_tracker",
]
