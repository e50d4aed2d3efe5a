"""Engine options on the CPU, as tests use them."""

from __future__ import annotations

from dataclasses import replace

import torch

from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.options import EngineOptions

CPU = EngineOptions(Processes(torch.device("cpu")), group_by_length=True)


def pad_literally(width: int) -> EngineOptions:
    """Return what ``engine.fast=false`` means: batches drawn at random, padded to ``width`` tokens, no fused path."""
    return replace(CPU, pad_to=width, group_by_length=False, fused=False)
