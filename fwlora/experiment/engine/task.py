"""What a training learns: classes or numbers, their loss, and how texts are padded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fwlora.experiment.data.batching import Padding
from fwlora.experiment.engine.options import EngineOptions
from fwlora.experiment.tracking import task_metrics

# Few widths on a GPU, each a multiple of what its matrix units take at once.
GPU_WIDTH_MULTIPLE = 8
# Labels that torch's cross-entropy leaves out.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Task:
    """A task whose labels are classes.

    Attributes:
        counts_correct: whether predictions are right or wrong.
        pad_token_id: of the tokenizer.
        num_classes: outputs of the model: the classes, at least 2, or 1 for a number.
        task_metric: the metric that is compared, one of :data:`fwlora.experiment.tracking.task_metrics.TASK_METRICS`.
        pad_left: whether padding comes before the tokens.
        max_length: tokens of an example at most; None where there is no limit.
    """

    counts_correct: ClassVar[bool] = True

    pad_token_id: int
    num_classes: int
    task_metric: str
    pad_left: bool = False
    max_length: int | None = None

    def padding(self, engine: EngineOptions) -> Padding:
        """Return how the batches are padded."""
        multiple = GPU_WIDTH_MULTIPLE if engine.pad_to is None and engine.device.type == "cuda" else 1
        return Padding(self.pad_token_id, self.pad_left, engine.pad_to, multiple, self.max_length)

    def sum_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the examples' losses, shape ().

        Args:
            outputs: logits, shape (examples, classes).
            labels: classes, shape (examples,); :data:`IGNORED_LABEL` counts nothing.
        """
        return nn.functional.cross_entropy(outputs, labels, reduction="sum")

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the predicted classes of logits, shape (examples,)."""
        return outputs.argmax(dim=-1)

    def count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return how many predictions equal their labels, shape ()."""
        return (self.predict(outputs) == labels).sum()

    def ignore(self, labels: Tensor) -> None:
        """Overwrite labels so that their examples count nothing."""
        labels.fill_(IGNORED_LABEL)

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> Mapping[str, float]:
        """Return every task metric by name; labels and predictions of shape (examples,)."""
        return task_metrics.compute_task_metrics(labels, predictions, self.num_classes)

    def make_predictions(self, examples: int) -> np.ndarray:
        """Return zeros of the type of a prediction, shape (examples,)."""
        return np.zeros(examples, dtype=np.int64)


@dataclass(frozen=True)
class RegressionTask(Task):
    """A task whose labels are numbers: ``num_classes`` is 1, the loss the squared error, as in BERT's STS-B."""

    counts_correct: ClassVar[bool] = False

    def sum_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the examples' squared errors, shape ().

        Args:
            outputs: shape (examples, 1).
            labels: numbers, shape (examples,); NaN counts nothing.
        """
        errors = torch.where(labels.isnan(), 0.0, self.predict(outputs) - labels)
        return (errors**2).sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the predicted numbers, shape (examples,)."""
        return outputs.squeeze(-1).to(torch.promote_types(outputs.dtype, torch.float32))

    def count_correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return 0, shape (): a number is more or less wrong."""
        return torch.zeros((), device=outputs.device)

    def ignore(self, labels: Tensor) -> None:
        """Overwrite labels so that their examples count nothing."""
        labels.fill_(torch.nan)

    def make_predictions(self, examples: int) -> np.ndarray:
        """Return zeros of the type of a prediction, shape (examples,)."""
        return np.zeros(examples, dtype=np.float32)


def make_task(pad_token_id: int, num_classes: int, task_metric: str, *, pad_left: bool, max_length: int | None) -> Task:
    """Make a task of classes, or of numbers where ``num_classes`` is 0; see :class:`Task`."""
    if num_classes:
        return Task(pad_token_id, num_classes, task_metric, pad_left, max_length)
    return RegressionTask(pad_token_id, 1, task_metric, pad_left, max_length)
