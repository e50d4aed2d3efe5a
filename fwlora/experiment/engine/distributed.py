"""Data-parallel processes, one or several by the same code: what ``torchrun`` or ``accelerate launch`` started.

Accelerate wraps the model and reduces; a batch is always the whole batch, of which every process computes its share, so
that a run means the same however many processes take part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def is_main_process() -> bool:
    """Whether this process is the first of those that were started together, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """The processes of this training, seen from one of them.

    Args:
        device: what was chosen for one process; with several GPUs each process gets its own.
    """

    def __init__(self, device: torch.device) -> None:
        # The precision is the run's, whatever the launcher was told.
        self._accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.count = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self.device = self._accelerator.device if self.count > 1 else device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over processes in every backward pass."""
        if self._accelerator.distributed_type == DistributedType.NO:
            return model
        return self._accelerator.prepare_model(model, device_placement=False)

    def share(self, batches: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
        """This process's examples of every batch, and whether they count.

        A process always has something to compute, since the others wait for it: where a batch has too few examples, its
        first one, which does not count.
        """
        own = [batch[self.index :: self.count] for batch in batches]
        counted = [len(part) > 0 for part in own]
        return [part if len(part) else batch[:1] for part, batch in zip(own, batches, strict=True)], counted

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients are averaged in the last backward pass of a step only."""
        if last or self.count == 1:
            yield
            return
        with self._accelerator.no_sync(model):
            yield

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, the same on each."""
        return values if self.count == 1 else self._accelerator.reduce(values, "sum")

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """The sum over processes of integers."""
        if self.count == 1:
            return values
        return self.sum(torch.from_numpy(values).to(self.device)).cpu().numpy()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, so that the others find its caches."""
        with self._accelerator.main_process_first():
            yield
