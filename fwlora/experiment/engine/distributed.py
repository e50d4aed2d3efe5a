"""Data-parallel processes by torch.distributed, one or several by the same code: those that ``torchrun`` started.

A batch is always the whole batch, of which every process computes its share, so that a run gives the same for any
number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_main_process() -> bool:
    """Return whether this process is the first of those that were started together, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_process_group() -> None:
    """Leave the group that :class:`Processes` joined, if it did; a process that ends without it makes torch warn."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes of this training, as one of them takes part in it.

    Args:
        device: of a single process; with several GPUs each process gets its own.

    Attributes:
        count: processes.
        index: of this process, from 0.
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        self.device = device
        if self.count == 1:
            return
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model with its gradients averaged over processes in every backward pass."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def share(self, batches: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
        """Return this process's examples of every batch, and whether they count.

        A process always has something to compute, since the others wait for it: where a batch has too few examples, its
        first one, which does not count.
        """
        own = [batch[self.index :: self.count] for batch in batches]
        counted = [len(part) > 0 for part in own]
        return [part if len(part) else batch[:1] for part, batch in zip(own, batches, strict=True)], counted

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Average gradients in the last backward pass of a step only."""
        if last or not isinstance(model, DistributedDataParallel):
            yield
            return
        with model.no_sync():
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes, the same on each."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over processes of an array, which all have in one shape."""
        if self.count == 1:
            return values
        return self.sum(torch.from_numpy(values).to(self.device)).cpu().numpy()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, so that the others find its caches."""
        if self.count > 1 and self.index > 0:
            dist.barrier()
        yield
        if self.count > 1 and self.index == 0:
            dist.barrier()
