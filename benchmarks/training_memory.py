"""Peak resident memory of a short training on so many examples: ``python -m benchmarks.training_memory GLUE EXAMPLES``.

Run by ``benchmarks.training`` in a fresh process, after one that only fills the token cache.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common import make_lora_method
from benchmarks.glue_data import task_splits
from benchmarks.training_quality import training_options
from fwlora.experiment.engine.device import peak_memory_mib
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions
from fwlora.experiment.engine.task import Task

STEPS = 30


class Stop(Exception):
    """Enough steps."""


def main() -> None:
    glue, examples = sys.argv[1], int(sys.argv[2])
    split, eval_split, pad_token_id = task_splits(glue, "sst2", examples)
    model, method = make_lora_method("minilm", 8, torch.device("cpu"), 0)
    after_step = method.after_step

    def stop_after(step: int) -> None:
        after_step(step)
        if step == STEPS:
            raise Stop

    method.after_step = stop_after  # type: ignore[method-assign]
    device = torch.device("cpu")
    try:
        train(
            model, method, split, eval_split, training_options(0, 1, 1e-3), Task(pad_token_id, 2, "accuracy"),
            EngineOptions(Processes(device)), log=lambda row: None,
        )  # fmt: skip
    except Stop:
        print(peak_memory_mib(device))


if __name__ == "__main__":
    main()
