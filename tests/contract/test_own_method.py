"""A method of one's own through a whole run, without a change to the program."""

from __future__ import annotations

import shutil

from fwlora.experiment.settings.hydra_arguments import compose_settings
from src.train import run_training
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.toy_method import registered_toy

LORA = "comparative-1-roberta-base-110M--CoLA-GLUE"


def test_a_run_of_a_registered_method(tmp_path, tiny_roberta, tiny_glue, caplog):
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    text = (CONFIG_DIR / "runs" / f"{LORA}.yaml").read_text()
    (tmp_path / "config" / "runs" / "toy.yaml").write_text(
        text.replace(LORA, "toy").replace("baseline_lora", "toy_method") + "toy: {pause: 100}\n"
    )
    arguments = [
        "run=toy", "mode=trial", f"run.model.pretrained_id={tiny_roberta}", f"run.dataset.name={tiny_glue}",
        "run.model.parameter_budget_percent=5.0",
    ]  # fmt: skip
    caplog.set_level("INFO", "fwlora")
    with registered_toy():
        run_training(compose_settings(arguments, tmp_path / "config", {}))
    printed = caplog.text
    assert "toy_method, seed 42, mode trial" in printed and "step 2/2" in printed
