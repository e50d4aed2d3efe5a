"""Everything that a training changes, so that it can be saved between two optimizer steps and continued exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fwlora.experiment.engine.meters import EpochMeter, PhaseClock
from fwlora.experiment.methods import Method


@dataclass
class TrainingPosition:
    """How far a training has come.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs finished.
        step_in_epoch: optimizer steps taken of the epoch that is not finished.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass
class TrainState:
    """The parts of a training that change from step to step.

    Attributes:
        model: adapted; of its parameters those that are trained.
        method: what it measured.
        optimizer: with moments.
        scheduler: of the learning rate.
        meter: sums of the current epoch.
        clock: seconds by phase.
        position: how far the training has come.
        epoch_rows: history rows of the finished epochs.
        device: whose random state counts, beside the CPU's.
    """

    model: nn.Module
    method: Method
    optimizer: Optimizer
    scheduler: LRScheduler
    meter: EpochMeter
    clock: PhaseClock
    device: torch.device
    position: TrainingPosition = field(default_factory=TrainingPosition)
    epoch_rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; step values that wait are logged first.

        Call it between two optimizer steps. Tensors are the live ones: save or copy them before the next step.
        """
        self.meter.flush()
        return {
            "position": asdict(self.position),
            "weights": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "meter": self.meter.state_dict(),
            "clock": dict(self.clock.seconds),
            "cpu_seconds": self.clock.cpu_seconds,
            "epoch_rows": [dict(row) for row in self.epoch_rows],
            "random": self._random_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, with parts that were made from the same options.

        Raises:
            KeyError: a part or a trained parameter is missing.
            ValueError: the state of another method or other options.
        """
        # The method first: it may change shapes of adapters, which weights and moments then fit.
        self.method.load_state_dict(state["method"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.meter.load_state_dict(state["meter"])
        self.clock.seconds.update(state["clock"])
        self.clock.cpu_seconds = state["cpu_seconds"]
        self.position = TrainingPosition(**state["position"])
        self.epoch_rows = [dict(row) for row in state["epoch_rows"]]
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states
