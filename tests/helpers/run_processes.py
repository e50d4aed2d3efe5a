"""One of the processes of tests/experiment/engine/test_distributed.py: trains through the engine, saves its result.

Started as ``torchrun --nproc-per-node 2 -m tests.helpers.run_processes FOLDER METHOD``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adapters import find_adapter_pairs
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.engine.distributed import Processes, is_main_process, leave_process_group
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions, TrainingOptions
from fwlora.experiment.engine.task import Task
from fwlora.experiment.methods import Method
from fwlora.experiment.methods.fw_lora import FwLoraMethod
from fwlora.experiment.methods.lora import LoraMethod
from tests.helpers.fused_models import adapt, make_base


def make_split(count: int, seed: int) -> TokenizedSplit:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 20, size=count)
    tokens = generator.integers(3, 60, size=lengths.sum()).astype(np.int32)
    return TokenizedSplit(
        tokens, None, np.concatenate([[0], np.cumsum(lengths)]), generator.integers(0, 2, count).astype(np.int64)
    )


def make_method(model: nn.Module, name: str) -> Method:
    if name == "lora":
        return LoraMethod(find_adapter_pairs(model))
    options = FisherWeighting(estimator="exact", warmup_steps=3, fisher_every=1, strength=0.1, decay=0.5)
    return FwLoraMethod(FisherWeightedLora(model, options))


def run(name: str) -> dict:
    """Nine examples more than the batches hold: the last batch has one, and one process nothing that counts."""
    warnings.simplefilter("ignore")
    model = adapt(make_base())
    method = make_method(model, name)
    training = TrainingOptions(
        epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.1, gradient_accumulation_steps=2,
        max_gradient_norm=1.0, seed=3,
    )  # fmt: skip
    rows: list[dict] = []
    result = train(
        model, method, make_split(41, 0), make_split(21, 1), training, Task(0, 2, "accuracy"),
        EngineOptions(Processes(torch.device("cpu"))), log=lambda row: rows.append(dict(row)),
    )  # fmt: skip
    found = {
        "rows": rows,
        "predictions": result.last.predictions,
        "parameters": [parameter.detach() for parameter in model.parameters() if parameter.requires_grad],
    }
    if isinstance(method, FwLoraMethod):
        found["importance"] = method.fisher_weighted.importance()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    found = run(name)
    processes = Processes(torch.device("cpu"))
    assert processes.count == 2 and is_main_process() == (processes.index == 0)
    torch.save(found, folder / f"{processes.index}.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
