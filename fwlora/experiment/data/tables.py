"""Tables: both splits of a data set from the Hub, a folder or files, and their checked columns."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fwlora.experiment.data import glue
from fwlora.experiment.data.labels import LabelEncoder, describe_other_than_numbers, encode_numbers
from fwlora.experiment.data.text import TextSplit, make_split
from fwlora.experiment.errors import UserError, collecting
from fwlora.experiment.paths import CACHE_DIR
from fwlora.experiment.settings.schema import DatasetSettings
from fwlora.experiment.tracking.task_metrics import Predicted

FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# A split as `datasets.Dataset`, by the split's name.
Tables = Mapping[str, Any]


def name_dataset(dataset: DatasetSettings) -> str:
    """Name a data set and its subset in messages."""
    return f"data set {dataset.name!r}" + (f", {dataset.subset}" if dataset.subset else "")


def load_tables(dataset: DatasetSettings) -> Tables:
    """Load the training and the evaluation split.

    ``dataset.name`` is ``glue`` (the Hub's), any other Hub id, or a local folder: in the Hub's layout, or with files
    named by split, such as ``train.csv`` and ``validation.parquet``.

    Returns:
        Split name -> ``datasets.Dataset``, the training split first.

    Raises:
        UserError: a split that cannot be loaded, or one name for both splits.
    """
    if dataset.split == dataset.eval_split:
        raise UserError(f"run.dataset.split and run.dataset.eval_split are both {dataset.split!r}; name two splits")
    return {name: _load_table(dataset, name) for name in (dataset.split, dataset.eval_split)}


def find_missing_columns(tables: Tables, columns: Sequence[str]) -> Iterator[str]:
    """Yield a line for each table that lacks some of the columns."""
    for name, table in tables.items():
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            yield f"split {name!r} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}"


def encode_tables(
    tables: Tables, dataset: DatasetSettings, text_columns: Sequence[str], predicts: Predicted
) -> tuple[tuple[str, ...], list[TextSplit]]:
    """Read texts and labels; classes are those of the first table, the training split.

    Args:
        tables: split name -> ``datasets.Dataset``.
        dataset: names the label column.
        text_columns: the columns of an example's texts, in the tokenizer's order.
        predicts: whether labels are classes or numbers.

    Returns:
        The names of the classes, none for numbers, and a split per table.

    Raises:
        UserError: values that are not text, labels outside the classes or no numbers, too many classes, empty splits;
            all at once.
    """
    label_column = dataset.label_column
    train = next(iter(tables.values()))
    encoder = None
    if predicts == "classes":
        encoder = LabelEncoder.fit(train[label_column], getattr(train.features[label_column], "names", None))
    describe = describe_other_than_numbers if encoder is None else encoder.describe_unknown
    columns = {name: {column: list(table[column]) for column in text_columns} for name, table in tables.items()}
    labels = {name: list(table[label_column]) for name, table in tables.items()}
    with collecting(name_dataset(dataset)) as problems:
        if encoder is not None and encoder.problem:
            problems.append(f"column {label_column!r} {encoder.problem}")
        for name, texts in columns.items():
            unusable = describe(labels[name])
            if unusable:
                problems.append(f"split {name!r}, column {label_column!r}: {unusable}")
            problems.extend(_find_other_than_text(texts, name))
            if not labels[name]:
                problems.append(f"split {name!r} is empty")
    encode = encode_numbers if encoder is None else encoder.encode
    splits = [make_split(tuple(texts.values()), encode(labels[name])) for name, texts in columns.items()]
    return () if encoder is None else encoder.names, splits


def _find_other_than_text(columns: Mapping[str, Sequence[object]], split: str) -> Iterator[str]:
    for column, values in columns.items():
        bad = [row for row, value in enumerate(values) if not isinstance(value, str)]
        if bad:
            first = f"first row {bad[0]}: {values[bad[0]]!r}"
            yield f"split {split!r}, column {column!r}: {len(bad)} rows are not text, {first}"


def _load_table(dataset: DatasetSettings, split: str) -> Any:
    """Load one split as a ``datasets.Dataset``."""
    folder = Path(dataset.name)
    if dataset.name == "glue":
        if glue.find_task(dataset.subset) is None:
            raise UserError(
                f"run.dataset.subset = {dataset.subset!r} is no GLUE task; "
                f"choose one of {', '.join(glue.known_tasks())}"
            )
        return _fetch(dataset, glue.HUB_ID, dataset.subset, split=split, revision=dataset.revision)
    if folder.is_file():
        raise UserError(
            f"run.dataset.name = {dataset.name!r} is a single file; give the folder that holds one file per split, "
            f"named {dataset.split}{folder.suffix} and {dataset.eval_split}{folder.suffix}"
        )
    if not folder.is_dir():
        return _fetch(dataset, dataset.name, dataset.subset, split=split, revision=dataset.revision)
    named = [path for path in sorted(folder.iterdir()) if path.stem == split and path.suffix in FILE_FORMATS]
    if len(named) > 1:
        raise UserError(f"{folder} holds several files for split {split!r}: {', '.join(path.name for path in named)}")
    if named:
        # Quotation marks in a .tsv are text: GLUE's own files hold unbalanced ones.
        options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if named[0].suffix == ".tsv" else {}
        return _fetch(dataset, FILE_FORMATS[named[0].suffix], data_files=str(named[0]), split="train", **options)
    return _fetch(dataset, str(folder), dataset.subset, split=split)


def _fetch(dataset: DatasetSettings, *arguments: Any, **options: Any) -> Any:
    """Call ``datasets.load_dataset`` and turn every failure into one message."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    local = Path(dataset.name).exists()
    try:
        return datasets.load_dataset(*arguments, cache_dir=CACHE_DIR, **options)
    except Exception as error:  # datasets raises over twenty types here, several of them third-party
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no details'}"
        expected = (
            f"one in the Hub's layout, or one with {dataset.split}.csv and {dataset.eval_split}.csv (or .tsv, .json, "
            ".jsonl, .parquet), in UTF-8"
        )
        remedy = f"the folder must be {expected}" if local else f"without the Hub give a local folder: {expected}"
        subset = f", subset {dataset.subset!r}," if dataset.subset else ""
        raise UserError(f"run.dataset.name = {dataset.name!r}{subset} cannot be loaded ({reason}); {remedy}") from None
