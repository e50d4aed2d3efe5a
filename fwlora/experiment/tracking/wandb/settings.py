"""The node ``wandb``: entity, project and mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field

from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.tracking.registry import SourceChoice, TrackerSettings, register_tracker
from fwlora.experiment.tracking.tracker import RecordSource, Tracker


class WandbSettings(TrackerSettings):
    """``wandb``.

    Attributes:
        entity: W&B user or team.
        project: W&B project.
        mode: ``online``, ``offline`` (local files, to be sent by ``wandb sync``) or ``disabled`` (no W&B at all).
        required: whether an online run that cannot reach W&B is an error instead of an offline run.
    """

    environment: ClassVar[Mapping[str, str]] = {
        "mode": "WANDB_MODE",
        "entity": "WANDB_ENTITY",
        "project": "WANDB_PROJECT",
    }
    source_fields: ClassVar[tuple[str, ...]] = ("entity", "project")
    project_field: ClassVar[str | None] = "project"

    entity: str = Field(min_length=1)
    project: str = Field(min_length=1)
    mode: Literal["online", "offline", "disabled"] = "online"
    required: bool = False

    def limit_to_trial(self) -> Self:
        """Disable W&B."""
        return self.model_copy(update={"mode": "disabled", "required": False})

    def open_tracker(self, *, run_id: str, config: JsonMapping, directory: Path) -> Tracker:
        """Start a W&B run; see :func:`fwlora.experiment.tracking.wandb.writing.start_tracker`."""
        from fwlora.experiment.tracking.wandb.writing import start_tracker

        return start_tracker(self, run_id=run_id, config=config, directory=directory)

    def open_source(self, *, results_dir: Path, source: SourceChoice) -> RecordSource:
        """Return W&B's files under ``results_dir``, its server, or both."""
        from fwlora.experiment.tracking.wandb.reading import WandbSource

        return WandbSource(results_dir, source, self.entity, self.project)


register_tracker("wandb", WandbSettings)
