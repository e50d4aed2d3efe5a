"""Two processes over gloo are equal to one with the joint batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.process_worker import train_loop, train_with_trainer
from tests.helpers.small_models import make_adapted
from tests.helpers.torchrun import torchrun

WORKER = "tests.helpers.process_worker"


def run_two(folder: Path, estimator: str, kind: str) -> list[dict]:
    torchrun("-m", WORKER, str(folder), estimator, kind)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_two_processes_with_two_micro_batches_each_are_one_with_four(estimator, tmp_path):
    model = make_adapted()
    alone = train_loop(model, model, 0, 1, estimator)
    first, second = run_two(tmp_path, estimator, "loop")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-11, atol=1e-13)


def test_the_trainers_own_processes_are_one_with_the_joint_batch(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = train_with_trainer(tmp_path / "alone")
    first, second = run_two(tmp_path, "sketch", "trainer")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)
