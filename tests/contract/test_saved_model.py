"""What a full run saves can be used by itself: with labels, on another machine, with a card that says what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, pipeline

from tests.helpers.full_runs import full_run


@pytest.fixture
def three_classes(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    words = ["the cat", "no one", "a dog"]
    for split, times in (("train", 40), ("validation", 4)):
        frame = pd.DataFrame({"sentence": words * times, "label": ["fair", "bad", "good"] * times})
        frame.to_csv(folder / f"{split}.csv", index=False)
    return folder


# PEFT writes AdaLoRA's pattern under names that its own loader then calls unmatched.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", ["baseline_lora", "adalora", "proposed_fw_lora"])
def test_a_pipeline_answers_with_the_names_of_the_classes(method, tiny_roberta, three_classes, recorded, tmp_path):
    settings, tracker = full_run(
        method, tiny_roberta, three_classes, recorded, "run.dataset.subset=null",
        "run.training.learning_rate=0.02", "run.training.epochs=4",
    )  # fmt: skip
    saved = tmp_path / "results" / settings.run.run_id / "adapter"
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved, moved)
    answers = pipeline("text-classification", model=str(moved))(["the cat", "no one", "a dog"])
    assert {answer["label"] for answer in answers} <= {"bad", "fair", "good"}
    # The same answers as the model that the run evaluated, which PEFT loads on the base.
    base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=3)
    adapter = PeftModel.from_pretrained(base, moved).eval()
    whole = AutoModelForSequenceClassification.from_pretrained(moved).eval()
    ids = torch.arange(4, 20).view(2, 8)
    torch.testing.assert_close(whole(input_ids=ids).logits, adapter(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert whole.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    accuracy = tracker.summary["final_eval_accuracy"]
    right = [answer["label"] == label for answer, label in zip(answers, ["fair", "bad", "good"], strict=True)]
    assert sum(right) / 3 == pytest.approx(accuracy)


def test_the_card_says_what_the_model_is(tiny_roberta, tiny_glue, recorded, tmp_path):
    settings, tracker = full_run("baseline_lora", tiny_roberta, tiny_glue, recorded)
    folder = tmp_path / "results" / settings.run.run_id / "adapter"
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "text-classification"
    facts = tracker.config["resolved"]
    value = tracker.summary["final_eval_matthews_correlation"]
    for told in (
        settings.run.method, facts["train_fingerprint"], facts["eval_fingerprint"], f"{value:.4f}", "torch 2",
        "eval_matthews_correlation, last epoch", "| seed | 42 |",
    ):  # fmt: skip
        assert told in body, told
    assert "[More Information Needed]" not in card
    recorded_settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recorded_settings == json.loads(settings.run.model_dump_json())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == settings.run.model.pretrained_id
    linked = folder / "model.safetensors"
    assert linked.stat().st_ino == (tiny_roberta / "model.safetensors").stat().st_ino or linked.stat().st_size > 0


def test_weights_that_the_hub_gave_are_found_in_its_cache(tiny_roberta, tiny_glue, recorded, tmp_path):
    """The Hub's cache as its client lays it out, and no network."""
    place = tmp_path / ".cache" / "models--someone--tiny"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_roberta, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    settings, _ = full_run("baseline_lora", Path("someone/tiny"), tiny_glue, recorded)
    folder = tmp_path / "results" / settings.run.run_id / "adapter"
    assert (folder / "model.safetensors").read_bytes() == (snapshot / "model.safetensors").read_bytes()
    assert "base_model: someone/tiny" in (folder / "README.md").read_text()
    answer = pipeline("text-classification", model=str(folder))("the cat")
    assert answer[0]["label"] in {"0", "1"}


def test_a_model_of_the_head_alone_is_saved_with_its_labels(tiny_roberta, tiny_glue, recorded, tmp_path):
    settings, _ = full_run("baseline_lora", tiny_roberta, tiny_glue, recorded, "run.model.lora.enabled=false")
    folder = tmp_path / "results" / settings.run.run_id / "adapter"
    assert pipeline("text-classification", model=str(folder))("the cat")[0]["label"] in {"0", "1"}


def test_the_code_of_a_model_folder_is_never_run(tiny_roberta, tiny_glue, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_roberta, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unknown", "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    command = [
        sys.executable, "-u", "-m", "src.main", "run=comparative-1-roberta-base-110M--CoLA-GLUE", "mode=trial",
        f"results_dir={tmp_path / 'results'}", f"run.model.pretrained_id={folder}", f"run.dataset.name={tiny_glue}",
    ]  # fmt: skip
    repository = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=repository, input="y\n" * 50, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "run.model.pretrained_id" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "ran").exists()
