from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from fwlora.adapters import find_adapter_pairs
from fwlora.architectures import TargetModuleError, encoder_parameter_count, find_target_matrices, head_module_names
from fwlora.config import attach_lora

DEFAULT_TARGETS = ["query", "key", "value", "intermediate", "output"]
ROBERTA_BASE = {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip


def weightless(model_type: str, **options):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **options))


def last_parts(names: list[str], count: int = 2) -> Counter:
    return Counter(".".join(name.split(".")[-count:]) for name in names)


def test_roberta_base_has_the_encoder_and_head_that_the_design_counts():
    model = weightless("roberta", **ROBERTA_BASE)
    assert encoder_parameter_count(model) == 124_055_040
    assert head_module_names(model) == ["classifier"]
    assert sum(p.numel() for p in model.classifier.parameters()) == 592_130


def test_bert_pooler_is_not_counted():
    model = weightless("bert", num_hidden_layers=1)
    pooler = sum(p.numel() for p in model.bert.pooler.parameters())
    assert pooler > 0
    assert encoder_parameter_count(model) == sum(p.numel() for p in model.bert.parameters()) - pooler


@pytest.mark.parametrize("model_type", ["roberta", "bert", "electra"])
def test_short_names_are_the_five_projections(model_type):
    model = weightless(model_type, num_hidden_layers=3)
    names = [m.name for m in find_target_matrices(model, DEFAULT_TARGETS)]
    assert last_parts(names) == {
        "self.query": 3, "self.key": 3, "self.value": 3, "intermediate.dense": 3, "output.dense": 3
    }  # fmt: skip
    assert not any("attention.output" in name or "classifier" in name or "pooler" in name for name in names)


def test_attention_output_only_when_asked_for():
    model = weightless("roberta", num_hidden_layers=2)
    names = [m.name for m in find_target_matrices(model, ["output", "attention.output"])]
    assert [name.split(".", 4)[-1] for name in names] == ["attention.output.dense", "output.dense"] * 2 or Counter(
        name.split("layer.")[1][2:] for name in names
    ) == {"attention.output.dense": 2, "output.dense": 2}
    only = [m.name for m in find_target_matrices(model, ["attention.output"])]
    assert all("attention.output.dense" in name for name in only) and len(only) == 2


@pytest.mark.parametrize(
    ("model_type", "options", "per_layer"),
    [
        ("distilbert", {"n_layers": 2}, {"q_lin", "k_lin", "v_lin", "lin1", "lin2"}),
        ("deberta-v2", {"num_hidden_layers": 2}, {"query_proj", "key_proj", "value_proj", "dense"}),
    ],
)
def test_other_families_by_the_same_names(model_type, options, per_layer):
    names = [m.name for m in find_target_matrices(weightless(model_type, **options), DEFAULT_TARGETS)]
    assert {name.split(".")[-1] for name in names} == per_layer
    assert len(names) == 10 and not any("attention.output" in name for name in names)


def test_shapes_are_in_by_out():
    matrices = find_target_matrices(weightless("roberta", num_hidden_layers=1), ["intermediate", "output"])
    assert [(m.in_features, m.out_features, m.cost) for m in matrices] == [(768, 3072, 3840), (3072, 768, 3840)]


def test_unmatched_targets_are_named_with_what_there_is():
    with pytest.raises(TargetModuleError, match=r"matches 'qkv', 'classifier'; it has .*attention\.self\.query"):
        find_target_matrices(weightless("roberta", num_hidden_layers=1), ["query", "qkv", "classifier"])


def test_heads_are_whatever_starts_untrained():
    assert head_module_names(weightless("distilbert", n_layers=1)) == ["pre_classifier", "classifier"]
    assert head_module_names(weightless("deberta-v2", num_hidden_layers=1)) == ["pooler", "classifier"]
    model = weightless("bert", num_hidden_layers=1)
    missing = ["classifier.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert head_module_names(model, missing) == ["classifier", "bert.pooler.dense"]
    wrong = [*missing, "bert.encoder.layer.0.output.dense.weight"]
    with pytest.raises(ValueError, match=r"1 encoder parameters are not in it, the first 'bert\.encoder\.layer\.0"):
        head_module_names(model, wrong)


def test_attached_ranks_and_scaling_are_those_asked_for_and_the_rest_is_frozen():
    config = AutoConfig.for_model(
        "roberta", vocab_size=50, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=24
    )
    model = AutoModelForSequenceClassification.from_config(config)
    matrices = find_target_matrices(model, DEFAULT_TARGETS)
    # Layers 1 and 11 end alike: a rank given to one must not reach the other.
    ranks = {m.name: (3 if ".layer.1." in m.name else 0 if ".layer.11." in m.name else 1) for m in matrices}
    adapted = attach_lora(model, ranks, scaling=2.0, dropout=0.1, head_modules=["classifier"], task_type="SEQ_CLS")
    pairs = find_adapter_pairs(adapted)
    assert {pair.name: pair.A.shape[0] for pair in pairs} == {name: rank for name, rank in ranks.items() if rank}
    assert all(pair.scaling == 2.0 and pair.module.lora_dropout["default"].p == 0.1 for pair in pairs)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainable)
    assert any("classifier.modules_to_save" in name for name in trainable)


def test_a_named_adapter_is_found_by_its_name():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]), adapter_name="mine")
    assert [pair.name for pair in find_adapter_pairs(adapted, "mine")] == ["0"]
    with pytest.raises(ValueError, match="no adapter named 'default'"):
        find_adapter_pairs(adapted)
