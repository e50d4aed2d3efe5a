"""Small encoders of the families that the fused path covers, and LoRA on them with random factors."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from fwlora.architectures import find_target_matrices

HIDDEN, HEADS, LAYERS = 32, 2, 3
ALL = ("query", "key", "value", "intermediate", "output")


def make_base(family: str = "roberta", dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=HIDDEN,
        embedding_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=60,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, classifier_dropout=0.0,
        type_vocab_size=2, attn_implementation="eager", **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_config(config)
    # Weights far from their initialization, or normalization and biases would hide mistakes.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapt(base: nn.Module, targets=ALL, dropout: float = 0.0, ranks=(3,), **options) -> nn.Module:
    """LoRA with both factors random; ranks go round, and 0 leaves a matrix out."""
    names = [matrix.name for matrix in find_target_matrices(base, targets)]
    pattern = {name: ranks[place % len(ranks)] for place, name in enumerate(names)}
    pattern = {name: rank for name, rank in pattern.items() if rank}
    config = LoraConfig(
        r=max(ranks), lora_alpha=6, rank_pattern=pattern, target_modules=list(pattern), lora_dropout=dropout,
        modules_to_save=["classifier"], **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model
