"""The engine on a GPU: `pytest -m gpu`; needs no package of the experiment program alone."""

from __future__ import annotations

import pytest
import torch

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.experiment.engine.distributed import Processes
from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.options import EngineOptions, TrainingOptions
from fwlora.experiment.engine.task import Task
from tests.helpers.fused_models import adapt, make_base
from tests.helpers.run_processes import make_method, make_split
from tests.helpers.small_models import loss_of, make_adapted, make_batches, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("name", ["lora", "fw_lora"])
def test_graphs_train_what_eager_passes_train(name, caplog):
    caplog.set_level("INFO", "fwlora")
    found = []
    for cuda_graphs in (False, True):
        model = adapt(make_base()).float().cuda()
        rows: list[dict] = []
        training = TrainingOptions(
            epochs=3, batch_size=8, learning_rate=1e-3, weight_decay=0.1, gradient_accumulation_steps=2,
            max_gradient_norm=1.0, seed=3,
        )  # fmt: skip
        engine = EngineOptions(Processes(torch.device("cuda")), cuda_graphs=cuda_graphs)
        train(
            model, make_method(model, name), make_split(200, 0), make_split(21, 1), training, Task(0, 2, "accuracy"),
            engine, log=lambda row, rows=rows: rows.append(dict(row)),
        )  # fmt: skip
        assert caplog.messages == []
        found.append((rows, [p.detach() for p in model.parameters() if p.requires_grad]))
    for got, expected in zip(found[1][0], found[0][0], strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_the_method_on_a_gpu_is_the_cpus_and_never_synchronizes(estimator):
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
