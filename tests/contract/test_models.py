"""Encoders of other families through the same door: heads, padding, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from fwlora.experiment.data.tokenization import tokenize
from fwlora.experiment.engine.loop import evaluate
from fwlora.experiment.errors import UserError
from fwlora.experiment.fused.forward import PlainClassifier
from fwlora.experiment.modeling.build import load_tokenizer
from fwlora.experiment.settings.hydra_arguments import compose_settings
from src.model import build_model, plan_adapters
from src.preprocess import load_task
from src.train import prepare_inputs, run_training
from tests.helpers.engine_options import CPU, pad_literally
from tests.helpers.paths import CONFIG_DIR

SMALL = {"vocab_size": 400, "pad_token_id": 1}
FAMILIES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "electra": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "deberta-v2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "albert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}
TARGETS = {"xlnet": ["layer_1", "layer_2"], "gpt2": ["c_attn", "c_fc"]}
LEFT_PADDED = {"xlnet"}
NO_PAD_TOKEN = {"gpt2"}


@pytest.fixture
def family(request, tiny_roberta, tmp_path) -> tuple[str, Path]:
    """A headless random model of the family, with the tiny tokenizer set up as that family's is."""
    name, folder = request.param, tmp_path / "model"
    torch.manual_seed(0)
    options = {**SMALL, **FAMILIES[name]}
    if name in NO_PAD_TOKEN:
        del options["pad_token_id"]
    AutoModel.from_config(AutoConfig.for_model(name, **options)).save_pretrained(folder)
    side = "left" if name in LEFT_PADDED else "right"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": side}
    if name not in NO_PAD_TOKEN:
        special["pad_token"] = "<pad>"
    file = str(tiny_roberta / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, model_max_length=64, **special).save_pretrained(folder)
    return name, folder


def settings_for(folder: Path, tiny_glue: Path, name: str, *arguments: str, mode: str = "trial"):
    given = [
        "run=proposed-roberta-base-110M--SST-2-GLUE", f"mode={mode}", "results_dir=results", "wandb.mode=disabled",
        f"run.model.pretrained_id={folder}", f"run.dataset.name={tiny_glue}", "run.model.parameter_budget_percent=5.0",
        "run.training.mixed_precision=fp32", *arguments,
    ]  # fmt: skip
    if name in TARGETS:
        given.append(f"run.model.lora.target_modules=[{','.join(TARGETS[name])}]")
    return compose_settings(given, CONFIG_DIR, {})


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_padding_does_not_change_what_a_model_says(family, tiny_glue):
    name, folder = family
    settings = settings_for(folder, tiny_glue, name)
    prepared = prepare_inputs(settings)
    task = prepared.task
    adapted = build_model(settings.run, prepared.plan, 2, task.pad_token_id, 100, torch.device("cpu"))
    with torch.no_grad():
        for pair in adapted.method.pairs:
            pair.B.normal_()
    split = tokenize(
        load_task(settings.run.dataset).evaluation, load_tokenizer(settings.run.model), settings.run.dataset
    )
    losses = [
        evaluate(PlainClassifier(adapted.model), split, 16, task, engine).loss for engine in (CPU, pad_literally(50))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert task.pad_left == (name in LEFT_PADDED)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_trial_runs_to_its_end(family, tiny_glue, caplog):
    caplog.set_level("INFO", "fwlora")
    name, folder = family
    run_training(settings_for(folder, tiny_glue, name))
    assert "eval_accuracy" in caplog.text


def test_a_bert_without_pooler_weights_trains_its_pooler(tmp_path, tiny_roberta, tiny_glue):
    folder = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**SMALL, **FAMILIES["bert"])).save_pretrained(folder)
    settings = settings_for(folder, tiny_glue, "bert")
    adapted = build_model(settings.run, plan_adapters(settings.run.model), 2, 1, 100, torch.device("cpu"))
    trained = {n for n, p in adapted.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {name.rsplit("modules_to_save", 1)[0] for name in trained} == {
        "base_model.model.bert.pooler.dense.", "base_model.model.classifier."
    }  # fmt: skip


def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_roberta, tiny_glue):
    folder = tmp_path / "bert"
    AutoModel.from_config(BertConfig(**SMALL, **FAMILIES["bert"])).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    settings = settings_for(folder, tiny_glue, "bert")
    with pytest.raises(UserError, match=r"its weights do not fit Bert\w+: \d+ encoder parameters are not"):
        build_model(settings.run, plan_adapters(settings.run.model), 2, 1, 100, torch.device("cpu"))


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"remove": "tokenizer.json vocab.json merges.txt"}, "holds no file of a tokenizer"),
        ({"remove": "model.safetensors"}, "holds no file of weights"),
        ({"garble": "model.safetensors"}, "'.*' cannot be fetched"),
    ],
)
def test_incomplete_folders_are_refused(broken, expected, tmp_path, tiny_roberta, tiny_glue):
    folder = tmp_path / "model"
    shutil.copytree(tiny_roberta, folder)
    for name in broken.get("remove", "").split():
        (folder / name).unlink(missing_ok=True)
    if "garble" in broken:
        (folder / broken["garble"]).write_bytes(b"version https://git-lfs" * 40)
    with pytest.raises(UserError, match=expected):
        run_training(settings_for(folder, tiny_glue, "roberta"))


def test_a_tokenizer_without_any_end_is_refused(tmp_path, tiny_roberta, tiny_glue):
    folder = tmp_path / "model"
    shutil.copytree(tiny_roberta, folder)
    for path in folder.glob("token*_config.json"):
        path.unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_roberta / "tokenizer.json"), unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        prepare_inputs(settings_for(folder, tiny_glue, "roberta"))
