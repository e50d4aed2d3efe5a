"""Data of a run, from ``run.dataset`` to tokens.

1. Source: the embedded task ``acceptability``, GLUE from the Hub, any other data set of the Hub, or a local folder.
2. Columns: one or two text columns and a label column; GLUE's own for a GLUE task.
3. Labels: the classes present in the training split, numbered and named; numbers where the metric is one of numbers.
4. Limits: a fixed random part of either split, the same for every training seed.
5. Tokens: special tokens included, cut at ``max_length``, padded later, batch by batch.

The specified data are GLUE's SST-2 (67,349 training and 872 development sentences) and CoLA (8,551 and 1,043). A search
holds a part of the training split out, so that the reported split selects nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwlora.experiment.data import acceptability, glue
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.tables import encode_tables, find_missing_columns, load_tables, name_dataset
from fwlora.experiment.data.text import TaskData, draw_subset, make_split, split_heldout
from fwlora.experiment.data.tokenization import tokenize
from fwlora.experiment.errors import UserError, collecting
from fwlora.experiment.settings.schema import DatasetSettings, RunSettings
from fwlora.experiment.tracking.task_metrics import TASK_METRICS

EMBEDDED_TASK = "acceptability"
# Column names that are tried for data other than GLUE's, in this order.
COMMON_TEXT_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"))


def load_task(dataset: DatasetSettings) -> TaskData:
    """Load both splits of a task and check them.

    Args:
        dataset: the node ``run.dataset``. ``name`` is ``acceptability`` (embedded, no files needed), ``glue`` (cached
            in ``.cache/``), any other Hub id, or a local folder: in the Hub's layout, or with a file per split, such as
            ``train.csv`` and ``validation.csv``.

    Returns:
        The task with ``train_examples`` and ``eval_examples`` of its splits.

    Raises:
        UserError: data that cannot be fetched, splits or columns that are missing, labels that cannot be learnt.
    """
    data = load_embedded_task(dataset) if dataset.name == EMBEDDED_TASK else load_table_task(dataset)
    return data.limit(dataset.train_examples, dataset.eval_examples, dataset.subset_seed)


def load_embedded_task(dataset: DatasetSettings) -> TaskData:
    """Generate the acceptability task: minimal pairs of the project's own grammar, scored by Matthews correlation.

    Raises:
        UserError: splits other than ``train`` and ``validation``.
    """
    if (dataset.split, dataset.eval_split) != ("train", "validation"):
        raise UserError(
            f"run.dataset.split = {dataset.split!r} and run.dataset.eval_split = {dataset.eval_split!r}: the embedded "
            "task has the splits 'train' and 'validation'"
        )
    train, evaluation = (
        make_split(([s.text for s in sentences],), np.array([s.label for s in sentences], dtype=np.int64))
        for sentences in acceptability.generate_task().values()
    )
    return TaskData(EMBEDDED_TASK, ("unacceptable", "acceptable"), "matthews_correlation", train, evaluation)


def load_table_task(dataset: DatasetSettings) -> TaskData:
    """Load a task whose splits are tables with named columns.

    ``run.dataset.metric`` names what the task is scored by; null stands for GLUE's metric where the subset has the name
    of a GLUE task, and for accuracy elsewhere. A metric of numbers makes the task a regression.

    Raises:
        UserError: see :func:`load_task`.
    """
    tables = load_tables(dataset)
    available = list(tables[dataset.split].columns)
    with collecting(name_dataset(dataset)) as problems:
        text_columns = choose_text_columns(dataset, available)
        if not text_columns:
            expected = " or ".join("+".join(columns) for columns in list_text_columns(dataset))
            problems.append(
                f"no text column found: expected {expected}, found {', '.join(available)}; "
                "name it by run.dataset.text_columns"
            )
        problems += find_missing_columns(tables, (*text_columns, dataset.label_column))
        metric = dataset.metric or glue.find_task_metric(dataset.subset)
        if dataset.label_names and TASK_METRICS[metric].predicts == "numbers":
            problems.append(f"run.dataset.label_names names classes, but with the metric {metric} labels are numbers")
    label_names, (train, evaluation) = encode_tables(tables, dataset, text_columns, TASK_METRICS[metric].predicts)
    task = dataset.subset or Path(dataset.name).name
    return TaskData(task, label_names, metric, train, evaluation)


def list_text_columns(dataset: DatasetSettings) -> list[tuple[str, ...]]:
    """List the text columns that are tried where ``run.dataset.text_columns`` is null: GLUE's own first."""
    task = glue.find_task(dataset.subset)
    return [*([task.columns] if task else []), *COMMON_TEXT_COLUMNS]


def choose_text_columns(dataset: DatasetSettings, available: Sequence[str]) -> tuple[str, ...]:
    """Choose the text columns: those of the settings, or the first usual ones that the table has; () where none fit."""
    if dataset.text_columns:
        return tuple(dataset.text_columns)
    usual = list_text_columns(dataset)
    return next((columns for columns in usual if set(columns) <= set(available)), ())


def tokenize_task(data: TaskData, tokenizer: Any, dataset: DatasetSettings) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Tokenize what the run trains on and what it is evaluated on.

    A pair of texts becomes one sequence, in the tokenizer's own form for pairs.

    Raises:
        UserError: an example without tokens, or longer than ``max_length`` while truncation is off.
    """
    return tokenize(data.train, tokenizer, dataset), tokenize(data.evaluation, tokenizer, dataset)


def tokenize_search_task(data: TaskData, tokenizer: Any, run: RunSettings) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Tokenize what the trials of a search train on and what they are scored on: two parts of the training split.

    Raises:
        UserError: too few examples of some class, or see :func:`tokenize_task`.
    """
    rest, heldout = split_heldout(data.train, run.optuna.heldout_fraction, run.optuna.heldout_seed)
    rest = draw_subset(rest, run.optuna.train_examples, run.dataset.subset_seed)
    return tokenize(rest, tokenizer, run.dataset), tokenize(heldout, tokenizer, run.dataset)
