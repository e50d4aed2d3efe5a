"""GLUE's tokens for MiniLM, as the experiment program makes them."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import MINILM
from fwlora.experiment.data.batching import Padding, TokenizedSplit, collate, plan_epoch
from fwlora.experiment.data.glue import find_task
from fwlora.experiment.data.tables import encode_tables, load_tables
from fwlora.experiment.data.text import draw_subset
from fwlora.experiment.data.tokenization import tokenize
from fwlora.experiment.modeling.build import load_tokenizer
from fwlora.experiment.paths import CONFIG_DIR
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.tracking.task_metrics import TASK_METRICS


def load_sentences(
    glue: str, subset: str, batch_size: int, batches: int, seed: int
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The first batches of a GLUE task for MiniLM, as the experiment program draws them: of like length, shuffled."""
    split, _, pad_token_id = task_splits(glue, subset, None)
    drawn: list[np.ndarray] = []
    for epoch in itertools.count():
        drawn += plan_epoch(split.lengths, batch_size, seed=seed, epoch=epoch, by_length=True)
        if len(drawn) >= batches:
            break
    made = collate(split, drawn[:batches], Padding(pad_token_id), torch.device("cpu"))
    return [(batch.inputs(), batch.labels) for batch in made]


def task_splits(glue: str, subset: str, train_examples: int | None) -> tuple[TokenizedSplit, TokenizedSplit, int]:
    """MiniLM's tokens of a GLUE task's training and development splits, and the padding token."""
    run = {"cola": "comparative-1-roberta-base-110M--CoLA-GLUE", "sst2": "comparative-1-roberta-base-110M--SST-2-GLUE"}
    arguments = [f"run={run[subset]}", "mode=full", "results_dir=.", f"run.dataset.name={glue}"]
    settings = compose_settings([*arguments, f"run.model.pretrained_id={MINILM}"], CONFIG_DIR, {}).run
    tokenizer = load_tokenizer(settings.model)
    task = find_task(subset)
    assert task is not None
    _, (train_texts, evaluation_texts) = encode_tables(
        load_tables(settings.dataset), settings.dataset, task.columns, TASK_METRICS[task.metric].predicts
    )
    train_texts = draw_subset(train_texts, train_examples, settings.dataset.subset_seed)
    train, evaluation = (tokenize(split, tokenizer, settings.dataset) for split in (train_texts, evaluation_texts))
    return train, evaluation, tokenizer.pad_token_id
