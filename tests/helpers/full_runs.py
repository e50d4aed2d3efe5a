"""Whole runs in this process, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.schema import ProgramSettings
from src.train import run_training
from tests.helpers.memory_tracker import MemoryTracker
from tests.helpers.paths import CONFIG_DIR

METHODS = {"baseline_lora": "comparative-1", "adalora": "comparative-2", "proposed_fw_lora": "proposed"}


def compose(run_id: str, tiny_roberta: Path, tiny_glue: Path, *arguments: str, mode: str = "full") -> ProgramSettings:
    """Compose the settings of a run file for a tiny model and tiny data."""
    # The tiny model's embeddings are small: its budget has to be a larger part.
    base = [
        f"run={run_id}", f"mode={mode}", "results_dir=results", f"run.model.pretrained_id={tiny_roberta}",
        "run.model.parameter_budget_percent=5.0", "wandb.mode=offline",
    ]  # fmt: skip
    if "GLUE" in run_id:
        base.append(f"run.dataset.name={tiny_glue}")
    return compose_settings([*base, *arguments], CONFIG_DIR, {})


def full_run(
    method: str,
    tiny_roberta: Path,
    tiny_glue: Path,
    recorded: list[MemoryTracker],
    *arguments: str,
    seed: int = 42,
) -> tuple[ProgramSettings, MemoryTracker]:
    """Make a run of 30 steps on CoLA; return its settings and its record, the last of the fixture ``recorded``."""
    run_id = f"{METHODS[method]}-roberta-base-110M--CoLA-GLUE"
    more = ["run.fw_lora.warmup_steps=5"] if method == "proposed_fw_lora" else []
    options = ["run.optuna.n_trials=0", f"run.training.seed={seed}", "resume=never", *more, *arguments]
    settings = compose(run_id, tiny_roberta, tiny_glue, *options)
    run_training(settings)
    return settings, recorded[-1]
