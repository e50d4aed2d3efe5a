"""What a training tells whoever saves it, or stops it."""

from __future__ import annotations

from fwlora.experiment.engine.state import TrainState


class TrainingWatch:
    """Called by a training where its state can be saved; a method that raises ends the training. This one does nothing.

    All processes of a training call theirs at the same places.
    """

    def after_step(self, state: TrainState) -> None:
        """Act between two optimizer steps."""

    def after_epoch(self, state: TrainState) -> None:
        """Act after an epoch's evaluation, whose row is logged."""

    def during_evaluation(self, state: TrainState) -> None:
        """Act between two batches of an evaluation; the state is that before the evaluation."""
