"""The engine under ``torchrun``: two processes train what one does, and the program records once."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.run_processes import run
from tests.helpers.torchrun import torchrun

WORKER = "tests.helpers.run_processes"


@pytest.mark.parametrize("method", ["lora", "fw_lora"])
def test_two_processes_train_what_one_does(method, tmp_path):
    alone = run(method)
    torchrun("-m", WORKER, str(tmp_path), method)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(first["parameters"], alone["parameters"], rtol=1e-7, atol=1e-9)
    assert first["predictions"].tolist() == second["predictions"].tolist() == alone["predictions"].tolist()
    assert len(first["rows"]) == len(alone["rows"])
    for got, other, expected in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        assert got == other and set(got) == set(expected)
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-9)
    if method == "fw_lora":
        assert first["importance"] == pytest.approx(alone["importance"], rel=1e-7)


def test_the_program_under_torchrun_prints_and_records_once(tiny_roberta, tiny_glue, tmp_path):
    run_id = "proposed-roberta-base-110M--SST-2-GLUE"
    printed = torchrun(
        "-m", "src.train", f"run={run_id}", "mode=full", f"results_dir={tmp_path}", "wandb.mode=offline",
        f"run.model.pretrained_id={tiny_roberta}", f"run.dataset.name={tiny_glue}", "run.training.epochs=1",
        "run.model.parameter_budget_percent=5.0", "run.fw_lora.warmup_steps=3", "run.optuna.n_trials=0",
    )  # fmt: skip
    assert printed.count("parameters: adapter") == 1
    assert (tmp_path / run_id / "adapter" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / run_id / "wandb").glob("offline-run-*"))) == 1
