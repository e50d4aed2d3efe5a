"""A small checkout whose src/main.py and src/evaluate.py are a line of code each."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.paths import CONFIG_DIR

RECORD = (
    "import json, sys; open('calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n'); print('step 1/2  epoch 1  loss 0.5')"
)


def make_study_repository(tmp_path: Path, main_code: str, evaluate_code: str = "print('table')") -> Path:
    shutil.copytree(CONFIG_DIR, tmp_path / "config")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text(main_code)
    (tmp_path / "src" / "evaluate.py").write_text(evaluate_code)
    (tmp_path / "config" / "study" / "mine.yaml").write_text(
        "results_dir: out\nruns:\n- comparative-1-roberta-base-110M--CoLA-GLUE\n"
        "- {run: proposed-roberta-base-110M--CoLA-GLUE, overrides: [run.fw_lora.warmup_steps=7]}\nseeds: [1, 2]\n"
        "overrides: [run.optuna.n_trials=0, wandb.mode=offline]\n"
    )
    return tmp_path
