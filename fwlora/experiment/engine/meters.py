"""Seconds by phase, and a history row per step without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.progress import Progress
from fwlora.experiment.tracking import metrics

# Step values are read from the device this many steps at a time: a read makes the host wait for the device.
STEPS_PER_FLUSH = 20


class DivergedError(ArithmeticError):
    """A training whose values are no longer finite.

    Attributes:
        loss: the value; None where a measurement is not finite instead.
        step: optimizer step, from 1, also of an evaluation after it; None where there was none.
        cause: what ceased to be finite first: the ``loss`` of the task, or the ``term`` that the method adds to it.
    """

    def __init__(
        self,
        reason: str,
        *,
        loss: float | None = None,
        step: int | None = None,
        cause: Literal["loss", "term"] = "loss",
    ) -> None:
        super().__init__(reason)
        self.loss, self.step, self.cause = loss, step, cause


class PhaseClock:
    """Wall-clock seconds by phase. On a GPU it waits for the device only where the phase changes.

    Attributes:
        seconds: by phase.
        cpu_seconds: that this process computed in warm-up and training, over all its threads; far from the wall clock's
            where other programs kept the processor busy.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {"warmup": 0.0, "train": 0.0, "eval": 0.0}
        self.cpu_seconds = 0.0
        self._device = device
        self._current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under ``warmup``, ``train`` or ``eval``."""
        if name != self._current:
            self._settle()
        self._current = name
        started, computed = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] += time.perf_counter() - started
        if name != "eval":
            self.cpu_seconds += time.process_time() - computed
        if name == "eval":
            self._settle()

    def _settle(self) -> None:
        """Wait for the device, and count that under the phase whose work it does."""
        if self._device.type == "cuda" and self._current is not None:
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)
            self.seconds[self._current] += time.perf_counter() - started


class EpochMeter:
    """Collects step values on the device and logs them :data:`STEPS_PER_FLUSH` at a time.

    Args:
        log: takes one history row.
        report: takes progress after every flush.
        processes: whose shares of loss and correct predictions are summed.
        total_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch.
        counts_correct: whether an epoch has an accuracy.

    Attributes:
        step_times_s: wall-clock seconds of each step, as means over the steps of a flush.
    """

    def __init__(
        self,
        log: Callable[[Mapping[str, float]], None],
        report: Callable[[Progress], None],
        processes: Processes,
        total_steps: int,
        steps_per_epoch: int,
        counts_correct: bool = True,
    ) -> None:
        self._counts_correct = counts_correct
        self._log, self._report, self._processes = log, report, processes
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._pending: list[tuple[dict[str, Any], Tensor, int]] = []
        self.step_times_s: list[float] = []
        self.start_epoch()

    def start_epoch(self) -> None:
        """Set the epoch's sums to zero."""
        self._loss_sum = self._correct = 0.0
        self._examples = 0
        self._last_flush = time.perf_counter()

    def add(self, values: dict[str, Any], shares: Tensor, examples: int) -> None:
        """Take a step.

        Args:
            values: the step's row, numbers or scalar tensors, the same in every process.
            shares: shape (2,): this process's part of the step's mean loss, and of its correct predictions.
            examples: of the step, in all processes.
        """
        self._pending.append((values, shares, examples))
        if len(self._pending) == STEPS_PER_FLUSH:
            self.flush()

    def flush(self) -> None:
        """Read all pending tensors in one transfer and log a row per step.

        Raises:
            DivergedError: a loss or a method's term that is not finite.
        """
        if not self._pending:
            return
        shares = self._processes.sum(torch.stack([shares for _, shares, _ in self._pending]).double())
        tensors = [value for values, _, _ in self._pending for value in values.values() if torch.is_tensor(value)]
        scalars = [tensor.detach().double().reshape(()).to(shares.device) for tensor in tensors]
        numbers = iter(torch.cat([shares.flatten(), *(scalar[None] for scalar in scalars)]).tolist())
        sums = [(next(numbers), next(numbers)) for _ in self._pending]
        now = time.perf_counter()
        self.step_times_s += [(now - self._last_flush) / len(self._pending)] * len(self._pending)
        self._last_flush = now
        row: dict[str, float] = {}
        for (values, _, examples), (loss, correct) in zip(self._pending, sums, strict=True):
            row = {name: next(numbers) if torch.is_tensor(value) else value for name, value in values.items()}
            row = {metrics.TRAIN_LOSS: loss, **row, metrics.EPOCH: row[metrics.GLOBAL_STEP] / self._steps_per_epoch}
            self._correct += correct
            self._loss_sum += loss * examples
            self._examples += examples
            self._log(row)
            step, term = int(row[metrics.GLOBAL_STEP]), row.get(metrics.PENALTY, 0.0)
            if np.isfinite(loss) and not np.isfinite(term):
                raise DivergedError(f"the method's term is {term} at step {step}", step=step, cause="term")
            if not np.isfinite(loss):
                raise DivergedError(f"the training loss is {loss} at step {step}", loss=loss, step=step)
        step = int(row[metrics.GLOBAL_STEP])
        epoch = (step - 1) // self._steps_per_epoch + 1
        warming_up = bool(row[metrics.FISHER_WARMUP])
        self._report(Progress(step, self._total_steps, epoch, row[metrics.TRAIN_LOSS], warming_up))
        self._pending.clear()

    def skip_time(self) -> None:
        """Leave out the time since the latest flush, which was not a step's."""
        self._last_flush = time.perf_counter()

    def epoch_values(self) -> dict[str, float]:
        """Return mean loss, and accuracy where labels are classes, over the epoch's training examples."""
        loss = {metrics.TRAIN_EPOCH_LOSS: self._loss_sum / self._examples}
        return {**loss, metrics.TRAIN_EPOCH_ACCURACY: self._correct / self._examples} if self._counts_correct else loss

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch's sums and the times of all steps; steps that wait for a flush are not among them."""
        sums = {"loss_sum": self._loss_sum, "correct": self._correct, "examples": self._examples}
        return {**sums, "step_times_s": list(self.step_times_s)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sums of :meth:`state_dict`."""
        self._loss_sum, self._correct, self._examples = state["loss_sum"], state["correct"], state["examples"]
        self.step_times_s = list(state["step_times_s"])
        self.skip_time()
