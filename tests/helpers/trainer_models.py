"""A small BERT, random sentences and transformers' Trainer on them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fwlora import FwLoraConfig
from fwlora.adapters import find_adapter_pairs

OPTIONS = {"strength": 0.5, "warmup_steps": 4, "fisher_every": 2, "sketch_size": 4, "decay": 0.5}
STEPS = 9


class Sentences(Dataset):
    """Random tokens whose label can be learned."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, 40, (rows, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.tokens[index], "labels": int(self.tokens[index, 0] % 2)}


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def wrap(base: nn.Module, config) -> nn.Module:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, config)


def make_model(**options) -> nn.Module:
    config = FwLoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS", **{**OPTIONS, **options}
    )
    model = wrap(make_base(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pair in find_adapter_pairs(model):
            pair.B.copy_(0.1 * torch.randn(pair.B.shape, generator=generator))
    return model


def make_trainer(model, folder: Path, callbacks, rows: int = 4 * STEPS, **arguments) -> Trainer:
    settings = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.05, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 3, "logging_steps": 1,
        "disable_tqdm": True, **arguments,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(output_dir=str(folder), **settings), train_dataset=Sentences(rows),
        eval_dataset=Sentences(12), callbacks=callbacks, compute_loss_func=joint_mean,
    )  # fmt: skip


def joint_mean(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """The mean over all micro-batches of a step; a classifier's own loss would be summed over them by the Trainer."""
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def adapters_of(model) -> list[torch.Tensor]:
    return [factor.detach().clone() for pair in find_adapter_pairs(model) for factor in (pair.A, pair.B)]
