"""Whole runs on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import src.train
from fwlora.experiment.tracking import metrics
from tests.helpers.full_runs import METHODS, full_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_computes_what_the_cpu_does(method, tiny_roberta, tiny_glue, recorded):
    arguments = ["run.training.mixed_precision=fp32", "run.model.lora.dropout=0.0"]
    for device in ("cpu", "cuda"):
        full_run(method, tiny_roberta, tiny_glue, recorded, *arguments, f"engine.device={device}")
    cpu, gpu = ([row["train_loss"] for row in tracker.rows if "train_loss" in row] for tracker in recorded)
    # The encoder's own dropout draws differ by device: only the first losses share everything but it.
    assert gpu[0] == pytest.approx(cpu[0], rel=0.1)
    assert recorded[1].config["resolved"]["environment"]["device"] == torch.cuda.get_device_name()
    assert recorded[1].summary[metrics.PEAK_MEMORY_MIB] > 0


def test_bf16_is_used_where_the_gpu_has_it(tiny_roberta, tiny_glue, recorded):
    settings, tracker = full_run("proposed_fw_lora", tiny_roberta, tiny_glue, recorded, "engine.device=cuda")
    resolved = tracker.config["resolved"]
    times = resolved["product_times_ms"]
    assert resolved["precision"] == ("bf16" if times["bf16"] <= 0.9 * times["fp32"] else "fp32")
    assert src.train.prepare_inputs(settings).engine.device.type == "cuda"
