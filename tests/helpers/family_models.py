"""A small random model, without dropout, of every family that the library is tried on, and inputs for it."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

VOCABULARY, CLASSES = 60, 2
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSIFIER, CAUSAL, SEQ2SEQ = AutoModelForSequenceClassification, AutoModelForCausalLM, AutoModelForSeq2SeqLM
FAMILIES: dict[str, tuple[type, str, dict]] = {
    "roberta": (CLASSIFIER, "roberta", {**BERT_LIKE, **NO_DROPOUT}),
    "bert": (CLASSIFIER, "bert", {**BERT_LIKE, **NO_DROPOUT}),
    "electra": (CLASSIFIER, "electra", {**BERT_LIKE, **NO_DROPOUT, "embedding_size": 16}),
    "deberta-v2": (
        CLASSIFIER, "deberta-v2",
        {**BERT_LIKE, **NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
         "position_buckets": 8, "norm_rel_ebd": "layer_norm", "pooler_dropout": 0.0},
    ),
    "modernbert": (
        CLASSIFIER, "modernbert", {**BERT_LIKE, "cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "sdpa"}
    ),
    "distilbert": (
        CLASSIFIER, "distilbert",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0,
         "seq_classif_dropout": 0.0},
    ),
    "gpt2": (
        CAUSAL, "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt2-classifier": (
        CLASSIFIER, "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": (CAUSAL, "llama", {**BERT_LIKE, "num_key_value_heads": 1}),
    "t5": (
        SEQ2SEQ, "t5",
        {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip


def make_base(family: str) -> nn.Module:
    auto_class, model_type, options = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto_class.from_config(AutoConfig.for_model(model_type, **COMMON, **options)).train()


def make_inputs(family: str, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (rows, 9), generator=generator)
    labels = (
        tokens if FAMILIES[family][0] is not CLASSIFIER else torch.randint(0, CLASSES, (rows,), generator=generator)
    )
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
