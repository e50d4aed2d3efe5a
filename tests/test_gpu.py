"""The engine on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from small_models import loss_of, make_adapted, make_batches, trainable

import src.train
from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.experiment import metrics
from tests.test_train import METHODS, full_run, recorded  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_computes_what_the_cpu_does(method, tiny_roberta, tiny_glue, recorded):  # noqa: F811
    arguments = ["run.training.mixed_precision=fp32", "run.model.lora.dropout=0.0"]
    for device in ("cpu", "cuda"):
        full_run(method, tiny_roberta, tiny_glue, recorded, *arguments, f"engine.device={device}")
    cpu, gpu = ([row["train_loss"] for row in tracker.rows if "train_loss" in row] for tracker in recorded)
    # The encoder's own dropout draws differ by device: only the first losses share everything but it.
    assert gpu[0] == pytest.approx(cpu[0], rel=0.1)
    assert recorded[1].config["resolved"]["environment"]["device"] == torch.cuda.get_device_name()
    assert recorded[1].summary[metrics.PEAK_MEMORY_MIB] > 0


def test_bf16_is_used_where_the_gpu_has_it(tiny_roberta, tiny_glue, recorded):  # noqa: F811
    settings, tracker = full_run("proposed_fw_lora", tiny_roberta, tiny_glue, recorded, "engine.device=cuda")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert tracker.config["resolved"]["precision"] == ("bf16" if native else "fp32")
    assert src.train.prepare(settings).execution.device.type == "cuda"


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_the_method_on_a_gpu_is_the_cpus_and_never_synchronises(estimator):
    importances, adapters = [], []
    for device in ("cpu", "cuda"):
        model = make_adapted().to(device)
        options = FisherWeighting(
            estimator=estimator, warmup_steps=4, fisher_every=2, strength=0.2, sketch_size=200_000, decay=0.5
        )
        fw = FisherWeightedLora(model, options)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for step, batch in enumerate(make_batches(7), start=1):
            loss_of(model, (batch[0].to(device), batch[1].to(device))).backward()
            if device == "cuda" and step != options.warmup_steps:
                torch.cuda.set_sync_debug_mode("error")
            try:
                fw.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
            optimizer.zero_grad()
        importances.append(torch.tensor(list(fw.importance().values())))
        adapters.append([pair.B.detach().cpu() for pair in fw.pairs])
    # Sketches differ by device: their own variance is what remains between the two.
    tolerance = 0.02 if estimator == "sketch" else 1e-9
    torch.testing.assert_close(importances[1], importances[0], rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(adapters[1], adapters[0], rtol=tolerance, atol=1e-6)
