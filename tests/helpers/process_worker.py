"""One of the two processes of tests/library/test_processes.py: train on its share of every batch, save the result.

Started as ``torchrun --nproc-per-node 2 -m tests.helpers.process_worker FOLDER ESTIMATOR KIND``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fwlora import FisherWeightedLora, FisherWeighting
from tests.helpers.small_models import loss_of, make_adapted, make_batches, trainable

STEPS, MICRO_BATCHES = 5, 2


def options_for(estimator: str) -> FisherWeighting:
    return FisherWeighting(strength=0.2, warmup_steps=3, fisher_every=1, decay=0.5, estimator=estimator, sketch_size=3)


def train_loop(model, inner, rank: int, world: int, estimator: str) -> dict:
    """Each step has ``MICRO_BATCHES`` micro-batches per process; one process alone takes all of them."""
    fw = FisherWeightedLora(model, options_for(estimator))
    optimizer = torch.optim.SGD(trainable(inner), lr=0.1)
    data = make_batches(STEPS * MICRO_BATCHES * 2)
    for step in range(STEPS):
        group = data[step * MICRO_BATCHES * 2 : (step + 1) * MICRO_BATCHES * 2]
        mine = group if world == 1 else group[rank::2]
        for place, batch in enumerate(mine):
            last = place == len(mine) - 1
            if isinstance(model, DistributedDataParallel) and not last:
                with model.no_sync():
                    loss_of(model, batch, len(mine)).backward()
            else:
                loss_of(model, batch, len(mine)).backward()
        fw.step()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "fisher": fw.fisher.values,
        "importance": torch.tensor(list(fw.importance().values())),
        "adapters": [p.detach() for p in trainable(inner)],
    }


def main() -> None:
    rank, (folder, estimator, kind) = int(os.environ["RANK"]), sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "trainer":
        result = train_with_trainer(Path(folder))
    else:
        dist.init_process_group("gloo")
        inner = make_adapted()
        result = train_loop(DistributedDataParallel(inner), inner, rank, 2, estimator)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def train_with_trainer(folder: Path) -> dict:
    """The callback under the Trainer's own data-parallel wrapping; RANK and WORLD_SIZE are set by the test."""
    from fwlora import FwLoraCallback
    from tests.helpers.trainer_models import adapters_of, make_model, make_trainer

    warnings.simplefilter("ignore")
    model, callback = make_model(fisher_every=1), FwLoraCallback()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(
        model, folder, [callback], rows=48, per_device_train_batch_size=8 // world, learning_rate=0.5, optim="sgd",
        **({"ddp_backend": "gloo"} if world > 1 else {}),
    )  # fmt: skip
    trainer.train()
    assert world == 1 or isinstance(trainer.model_wrapped, DistributedDataParallel)
    held = callback.fisher_weighted
    return {
        "fisher": held.fisher.values,
        "importance": torch.tensor(list(held.importance().values())),
        "adapters": adapters_of(model),
    }


if __name__ == "__main__":
    main()
