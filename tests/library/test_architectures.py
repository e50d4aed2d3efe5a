"""The encoder of every kind of model: its parameters, its head, and what target_modules=None leaves out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from fwlora import plan_ranks
from fwlora.architectures import encoder_parameter_count, find_target_matrices, head_module_names

TEXT, SOUND, IMAGE = (
    AutoModelForSequenceClassification, AutoModelForAudioClassification, AutoModelForImageClassification
)  # fmt: skip
SMALL = {"vocab_size": 50, "pad_token_id": 0}
LAYER = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
# Model type -> auto class, options, expected kinds of matrices for target_modules=None, and what is named as left out.
CASES = {
    "gptj": (
        TEXT, {**SMALL, "n_layer": 1, "n_embd": 64, "n_head": 4, "rotary_dim": 8},
        "q_proj k_proj v_proj fc_in fc_out", [],
    ),
    "mpt": (TEXT, {**SMALL, "n_layers": 1, "d_model": 64, "n_heads": 4}, "Wqkv up_proj down_proj", []),
    "wav2vec2": (SOUND, LAYER, "q_proj k_proj v_proj intermediate_dense output_dense", []),
    "hubert": (SOUND, LAYER, "q_proj k_proj v_proj intermediate_dense output_dense", []),
    "funnel": (
        TEXT, {**SMALL, "block_sizes": [1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
        "q_head k_head v_head linear_1 linear_2", [r"attention\.r_kernel is not a linear layer's"],
    ),
    "xlnet": (
        TEXT, {**SMALL, "n_layer": 1, "d_model": 64, "n_head": 4, "d_inner": 128}, "layer_1 layer_2",
        ["no matrix of the role 'query'", "'key'", "'value'", r"rel_attn\.q is not a linear layer's", r"rel_attn\.o "],
    ),
    "qwen2_moe": (
        TEXT, {**SMALL, **LAYER, "num_key_value_heads": 4, "num_experts": 2},
        "q_proj k_proj v_proj gate_proj up_proj down_proj",
        [r"experts\.gate_up_proj is not a linear", r"experts\.down_proj"],
    ),
    "mixtral": (
        TEXT, {**SMALL, **LAYER, "num_key_value_heads": 4, "num_local_experts": 2}, "q_proj k_proj v_proj",
        ["no matrix of the role 'intermediate'", "'output'", r"experts\.gate_up_proj", r"experts\.down_proj"],
    ),
    "whisper": (
        SOUND,
        {**SMALL, "encoder_layers": 1, "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "q_proj k_proj v_proj fc1 fc2", [],
    ),
    "vit": (IMAGE, LAYER, "q_proj k_proj v_proj fc1 fc2", []),
    "roberta": (TEXT, {**SMALL, **LAYER}, "query key value dense dense", []),
    "bart": (TEXT, {**SMALL, "encoder_layers": 1, "decoder_layers": 1}, "q_proj k_proj v_proj fc1 fc2", []),
}  # fmt: skip


def weightless(model_type: str) -> nn.Module:
    auto, options, *_ = CASES[model_type]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(AutoConfig.for_model(model_type, **options))


@pytest.mark.parametrize("model_type", CASES)
def test_the_projections_are_found_or_named_as_left_out(model_type):
    _, _, kinds, left_out = CASES[model_type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_ranks(weightless(model_type), 20.0)
    assert {matrix.name.split(".")[-1] for matrix in plan.matrices} == set(kinds.split())
    assert not any("classifier" in m.name or "score" in m.name or "projector" in m.name for m in plan.matrices)
    assert len(caught) == bool(left_out)
    for pattern in left_out:
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(str(caught[0].message))


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [
        ("whisper", ["projector", "classifier"]), ("wav2vec2", ["projector", "classifier"]), ("vit", ["classifier"]),
        ("bart", ["classification_head"]), ("xlnet", ["sequence_summary", "logits_proj"]), ("mixtral", ["score"]),
    ],
)  # fmt: skip
def test_what_the_task_adds_is_the_head_and_the_rest_the_encoder(model_type, heads):
    model = weightless(model_type)
    of_heads = sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())
    assert head_module_names(model) == heads
    assert encoder_parameter_count(model) == sum(p.numel() for p in model.parameters()) - of_heads


class Packed(nn.Linear):
    """As bitsandbytes keeps a 4-bit weight: two values a byte, in one column."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None, device="meta")
        packed = torch.zeros(of.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)


class PackedOutside(nn.Module):
    """As GPTQ keeps one: in buffers, without a parameter."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        self.register_buffer("qweight", torch.zeros(of.in_features // 8, of.out_features, dtype=torch.int32))
        self.bias = of.bias


@pytest.mark.parametrize("packing", [Packed, PackedOutside])
def test_packed_weights_count_as_the_matrices_they_stand_for(packing):
    model = weightless("roberta")
    expected = encoder_parameter_count(model)
    for path, module in list(model.roberta.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.roberta.get_submodule(parent), name, packing(module))
    assert sum(p.numel() for p in model.roberta.parameters()) < expected
    assert encoder_parameter_count(model) == expected


class Tied(nn.Module):
    """A model without a prefix, which says which of its modules is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.fc1, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 40)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> None:
        return None


def test_the_output_embeddings_are_no_matrix_of_the_encoder():
    with pytest.raises(ValueError, match=r"matches 'lm_head'; it has q_proj, fc1$"):
        find_target_matrices(Tied(), ["lm_head"])
    assert encoder_parameter_count(Tied()) == 8 * 8 + 8 + 8 * 16 + 16
