"""Encoders from folders: heads, tokenizers, positions, counts."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fwlora.adapters import find_adapter_pairs
from fwlora.config import attach_lora, plan_ranks
from fwlora.experiment.errors import UserError
from fwlora.experiment.methods.lora import LoraMethod
from fwlora.experiment.modeling.build import (
    check_max_length,
    count_parameters,
    load_classifier,
    load_tokenizer,
    make_weightless_model,
    train_head_only,
)
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.settings.schema import ModelSettings
from fwlora.experiment.tracking import metrics
from tests.helpers.paths import CONFIG_DIR


def model_settings(folder) -> ModelSettings:
    given = ["run=comparative-1-roberta-base-110M--CoLA-GLUE", "mode=full", f"run.model.pretrained_id={folder}"]
    return compose_settings(given, CONFIG_DIR, {}).run.model


def test_a_head_is_new_and_named_and_can_be_trained_alone(tiny_roberta):
    model, heads = load_classifier(model_settings(tiny_roberta), num_classes=3, pad_token_id=1)
    assert heads == ["classifier"] and model.classifier.out_proj.weight.shape == (3, 32)
    assert model.dtype == torch.float32 and model.config.pad_token_id == 1
    train_head_only(model, heads)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"classifier"}


def test_counts_add_up(tiny_roberta):
    settings = model_settings(tiny_roberta)
    model, heads = load_classifier(settings, 2, 1)
    unadapted = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.classifier.parameters())
    plan = plan_ranks(make_weightless_model(settings), 5.0, settings.lora.target_modules)
    adapted = attach_lora(model, plan.ranks, scaling=2.0, dropout=0.0, head_modules=heads, task_type="SEQ_CLS")
    counts = count_parameters(adapted, LoraMethod(find_adapter_pairs(adapted)), plan, unadapted)
    assert counts == {
        metrics.PARAMS_ADAPTER: plan.cost,
        metrics.PARAMS_HEAD: head,
        metrics.PARAMS_TRAINABLE: plan.cost + head,
        metrics.PARAMS_ENCODER: plan.encoder_parameters,
        metrics.PARAMS_TOTAL: unadapted + plan.cost,
        metrics.BUDGET_PARAMETERS: plan.budget,
    }


def test_texts_may_be_as_long_as_the_encoder_has_positions(tiny_roberta):
    settings = model_settings(tiny_roberta)
    check_max_length(settings, 138)
    with pytest.raises(UserError, match=r"max_length = 139: .* has positions for 138 tokens; use at most 138"):
        check_max_length(settings, 139)


def test_folders_without_a_tokenizer_or_weights_are_refused(tiny_roberta, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_roberta, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="holds no file of a tokenizer"):
        load_tokenizer(model_settings(folder))
    with pytest.raises(UserError, match="holds no file of weights"):
        make_weightless_model(model_settings(folder))


def test_weights_that_are_not_finite_are_refused_when_loaded(tiny_roberta, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_roberta, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("query.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are not finite, the first .*query\.weight"):
        load_classifier(model_settings(folder), 2, 1)


def test_a_head_of_another_size_is_drawn_anew_and_says_so(tiny_roberta, tmp_path, caplog):
    folder = tmp_path / "three"
    AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=3).save_pretrained(folder)
    for file in tiny_roberta.glob("tokenizer*"):
        shutil.copy(file, folder)
    model, heads = load_classifier(model_settings(folder), 2, 1)
    assert heads == ["classifier"] and model.classifier.out_proj.weight.shape[0] == 2
    assert (
        "classifier.out_proj.weight of its head has shape (3, 32) instead of (2, 32) and is drawn anew" in caplog.text
    )
