"""transformers' Trainer with PEFT as people run it, on our tokenized splits."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.engine.options import TrainingOptions


class Examples(Dataset[dict[str, Any]]):
    """A split as the Trainer wants it: one dictionary per example."""

    def __init__(self, split: TokenizedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        start, stop = self.split.offsets[index : index + 2]
        return {"input_ids": self.split.tokens[start:stop].tolist(), "labels": int(self.split.labels[index])}


class Collator:
    """Pads to the longest example of a batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row["input_ids"])] = row["input_ids"]
            mask[place, : len(row["input_ids"])] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), "labels": labels}


def make_trainer(
    model: nn.Module,
    split: TokenizedSplit,
    pad_token_id: int,
    training: TrainingOptions,
    *,
    precision: str = "fp32",
    grouped: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    device: torch.device | None = None,
) -> Trainer:
    """Make a Trainer with the engine's options; ``grouped`` draws batches of like length."""
    cpu = device is None or device.type == "cpu"
    lengths = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="fwlora-trainer-"),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.max_gradient_norm or 0.0,
        seed=training.seed,
        bf16=precision == "bf16",
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **lengths,  # type: ignore[arg-type]
    )
    return Trainer(
        model, arguments, train_dataset=Examples(split), data_collator=Collator(pad_token_id), callbacks=list(callbacks)
    )
