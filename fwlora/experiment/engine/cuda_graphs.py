"""Forward and backward of a batch shape as one CUDA graph: a small step on a GPU is bound by kernel launches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fwlora.experiment.data.batching import Batch

logger = logging.getLogger(__name__)

# Forward and backward of one batch; returns what is to be kept of it.
EagerPass = Callable[[Batch], Tensor]


@dataclass
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: Tensor


class GraphedPasses:
    """Run passes of a new shape eagerly, capture them the second time and replay them from then on.

    Gradients have to be zeroed in place. A pass with other shapes of parameters is another pass. Where capturing fails,
    all passes are run eagerly.

    Args:
        parameters: that receive gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._seen: set[Any] = set()
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None
        self._working = True

    def run(self, batch: Batch, variant: Any, eager: EagerPass) -> Tensor:
        """Return what ``eager(batch)`` returns, computed by a graph where there is one.

        Args:
            batch: on the device.
            variant: whatever else decides which operations the pass consists of; hashable.
            eager: runs the pass.
        """
        inputs = batch.inputs()
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        key = (shapes, variant, tuple(tuple(parameter.shape) for parameter in self._parameters))
        if not self._working or key not in self._seen:
            self._seen.add(key)
            return eager(batch)
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(batch, eager)
            except RuntimeError as error:
                self._working = False
                logger.warning("CUDA graphs are off: %s", str(error).splitlines()[0])
                return eager(batch)
        captured = self._captured[key]
        for name, value in inputs.items():
            getattr(captured.batch, name).copy_(value)
        captured.batch.labels.copy_(batch.labels)
        captured.graph.replay()
        return captured.result.clone()

    def _capture(self, batch: Batch, eager: EagerPass) -> _Captured:
        copies = {name: value.clone() for name, value in batch.inputs().items()}
        static = Batch(
            copies["input_ids"], copies.get("attention_mask"), copies.get("token_type_ids"), batch.labels.clone()
        )
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = eager(static)
        self._pool = graph.pool()
        return _Captured(graph, static, result)
