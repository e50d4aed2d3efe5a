"""Training loops in processes of their own that take one step when told to: what interleaved timings are made of."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

Loop = Callable[["Gate", dict[str, Any]], None]


class Gate:
    """What a loop calls after every step: it waits there until the next one is wanted.

    Args:
        connection: to the process that measures.
        settle: steps that are taken before the first measured one, without a word.
        synchronize: waits for the device.
    """

    def __init__(self, connection: Connection, settle: int, synchronize: Callable[[], None]) -> None:
        self._connection, self._settle, self._synchronize = connection, settle, synchronize
        self._started: float | None = None

    def step_done(self) -> None:
        """A step is over; returns when the next one may begin."""
        if self._settle > 0:
            self._settle -= 1
            if self._settle > 0:
                return
        self._synchronize()
        elapsed = None if self._started is None else time.perf_counter() - self._started
        self._connection.send(elapsed)
        if self._connection.recv() == "stop":
            raise StopStepping
        self._started = time.perf_counter()


class StopStepping(Exception):
    """No further step is wanted."""


class SteppedLoop:
    """A loop in a process of its own.

    Args:
        loop: importable function that trains, and calls its gate after every step.
        options: for it.
        settle: steps before the first measured one.
    """

    def __init__(self, loop: Loop, options: dict[str, Any], settle: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(loop, theirs, settle, options), daemon=True)
        self._process.start()
        theirs.close()

    def settle(self) -> Self:
        """Wait until the first measured step may begin; of many loops start one after the other has settled."""
        self._receive()
        return self

    def step(self) -> float:
        """Seconds of one step, from the end of the one before it: fetching its batch is part of it."""
        self._connection.send("step")
        return self._receive()

    def close(self) -> None:
        self._connection.send("stop")
        self._process.join(60)

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def take_rounds(loops: dict[str, SteppedLoop], rounds: Iterable[Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Take a step of each loop in every round, in random order, then close them; seconds by loop, shape (rounds,)."""
    order = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in rounds:
        for name in order.permutation(list(loops)):
            seconds[name].append(loops[name].step())
    for loop in loops.values():
        loop.close()
    return {name: np.array(values) for name, values in seconds.items()}


def _run(loop: Loop, connection: Connection, settle: int, options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    synchronize = torch.cuda.synchronize if options["device"] == "cuda" else lambda: None
    try:
        loop(Gate(connection, settle, synchronize), options)
        connection.send("the loop ended by itself")
    except (StopStepping, EOFError):
        return
    except Exception:
        connection.send(traceback.format_exc())
