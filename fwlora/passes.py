"""Passes of autograd: which of them belong to a step, and what a copied model does in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

OUTSIDE_OF_A_PASS = -1


class StepSums:
    """Sum one product per matrix over the passes of a step: those that add to some ``.grad``.

    Args:
        count: matrices.

    Attributes:
        counted: autograd's numbers of the passes that belong to the step.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.drop()

    def drop(self) -> None:
        """Start a new step."""
        self.counted: set[int] = set()
        self._sums: list[Tensor | None] = [None] * self._count
        self._waiting: dict[int, list[Tensor | None]] = {}

    def of_step(self) -> list[Tensor | None]:
        """Return the sums, None for a matrix that no pass reached."""
        return self._sums

    def add(self, index: int, product: Tensor) -> None:
        """Add what the running pass found; ``product`` must not be used afterwards."""
        number = current_pass()
        if number in self.counted or number == OUTSIDE_OF_A_PASS:
            _add_to(self._sums, index, product)
            return
        if number not in self._waiting:
            self._waiting[number] = [None] * self._count
            # What is not counted when its pass ends never will be.
            Variable._execution_engine.queue_callback(lambda: self._forget(number))
        _add_to(self._waiting[number], index, product)

    def count_pass(self) -> None:
        """Let the running pass belong to the step, with what it has found and will find."""
        number = current_pass()
        if number in self.counted:
            return
        self.counted.add(number)
        for index, product in enumerate(self._waiting.pop(number, [])):
            if product is not None:
                _add_to(self._sums, index, product)

    def _forget(self, number: int) -> None:
        self._waiting.pop(number, None)


class IdleHook:
    """What a copied or saved model has in place of a :class:`ForwardHook`."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def current_pass() -> int:
    """Return autograd's number of the running backward pass, or :data:`OUTSIDE_OF_A_PASS`."""
    return int(torch._C._current_graph_task_id())


def in_functional_transform() -> bool:
    """Return whether a transform of ``torch.func``, such as ``vmap(grad(f))``, is running."""
    return torch._C._functorch.maybe_current_level() is not None


def _add_to(products: list[Tensor | None], index: int, product: Tensor) -> None:
    previous = products[index]
    products[index] = product if previous is None else previous.add_(product)
