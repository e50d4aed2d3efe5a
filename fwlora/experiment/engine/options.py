"""How a training runs: its schedule and steps, and where and how it is computed. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from fwlora.experiment.engine.distributed import Processes
    from fwlora.experiment.fused.compiled import Kernels

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained for how long, and by which steps.

    Attributes:
        epochs: passes over the training examples, at least 1.
        batch_size: examples per micro-batch, over all processes.
        learning_rate: peak of the schedule.
        weight_decay: of matrices; biases and normalization have none.
        optimizer: a name of :mod:`fwlora.experiment.engine.optimizer`.
        lr_scheduler: a name of ``transformers.optimization.get_scheduler``.
        lr_scheduler_options: its own options.
        warmup_ratio: share of the steps in which the learning rate rises.
        gradient_accumulation_steps: micro-batches per optimizer step.
        max_gradient_norm: gradients are clipped to this L2 norm; None clips nothing.
        seed: of the order of examples and of dropout.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    lr_scheduler: str = "linear"
    lr_scheduler_options: Mapping[str, int | float | str] = field(default_factory=dict)
    warmup_ratio: float = 0.0
    gradient_accumulation_steps: int = 1
    max_gradient_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a training without epochs."""
        if self.epochs < 1:
            raise ValueError(f"`epochs` is {self.epochs}, must be at least 1")

    def steps_per_epoch(self, examples: int) -> int:
        """Return the optimizer steps of one pass over ``examples``."""
        return math.ceil(math.ceil(examples / self.batch_size) / self.gradient_accumulation_steps)

    def total_steps(self, examples: int) -> int:
        """Return the optimizer steps of the whole training."""
        return self.epochs * self.steps_per_epoch(examples)


@dataclass(frozen=True)
class EngineOptions:
    """Where and how to compute.

    Attributes:
        processes: that share every batch; they name the device.
        precision: ``bf16`` or ``fp32``.
        pad_to: pad every batch to this many tokens; None pads to the longest example of a batch.
        group_by_length: whether batches hold examples of like length; else they are drawn at random.
        fused: whether to compute by the fused path where it covers the model.
        cuda_graphs: on a GPU, capture the fused path's passes and replay them.
        kernels: on a CPU, compiled kernels of ``precision`` for the fused path's layers; None computes them by torch's
            operations.
    """

    processes: Processes
    precision: Precision = "fp32"
    pad_to: int | None = None
    group_by_length: bool = False
    fused: bool = True
    cuda_graphs: bool = False
    kernels: Kernels | None = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device
