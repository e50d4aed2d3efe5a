"""Tables: both splits of a data set from the Hub, a folder or files, and their checked columns."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from fwlora.experiment.data import glue
from fwlora.experiment.data.labels import LabelEncoder, describe_other_than_numbers, encode_numbers
from fwlora.experiment.data.table_files import READERS, Table, read_table_file
from fwlora.experiment.data.text import TextSplit, make_split
from fwlora.experiment.errors import UserError, collecting, explain_loader_error
from fwlora.experiment.paths import CACHE_DIR, expand_home, is_path
from fwlora.experiment.settings.schema import DatasetSettings
from fwlora.experiment.tracking.task_metrics import Predicted

logger = logging.getLogger(__name__)
# A split by its name.
Tables = Mapping[str, Table]


def name_dataset(dataset: DatasetSettings) -> str:
    """Name a data set and its subset in messages."""
    return f"data set {dataset.name!r}" + (f", {dataset.subset}" if dataset.subset else "")


def load_tables(dataset: DatasetSettings) -> Tables:
    """Load the training and the evaluation split.

    ``dataset.name`` is ``glue`` (the Hub's), any other Hub id, or a local folder: in the Hub's layout, or with files
    named by split, such as ``train.csv`` and ``validation.parquet``.

    Returns:
        Split name -> table, the training split first.

    Raises:
        UserError: a split that cannot be loaded, or one name for both splits.
    """
    if dataset.split == dataset.eval_split:
        raise UserError(f"run.dataset.split and run.dataset.eval_split are both {dataset.split!r}; name two splits")
    return {name: _load_table(dataset, name) for name in (dataset.split, dataset.eval_split)}


def find_missing_columns(tables: Tables, columns: Sequence[str]) -> Iterator[str]:
    """Yield a line for each table that lacks some of the columns."""
    for name, table in tables.items():
        missing = [column for column in columns if column not in table.columns]
        if missing:
            yield f"split {name!r} has no column {', '.join(missing)}; it has {', '.join(table.columns)}"


def encode_tables(
    tables: Tables, dataset: DatasetSettings, text_columns: Sequence[str], predicts: Predicted
) -> tuple[tuple[str, ...], list[TextSplit]]:
    """Read texts and labels; classes are those present in the first table, the training split.

    Args:
        tables: split name -> table.
        dataset: names the label column, and classes where its ``label_names`` do.
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
        encoder = LabelEncoder.fit(
            train.columns[label_column], train.class_names.get(label_column, ()), dataset.label_names
        )
    with collecting(name_dataset(dataset)) as problems:
        if encoder is not None and encoder.problem and train.columns[label_column]:
            problems.append(f"column {label_column!r} {encoder.problem}")
        for name, table in tables.items():
            labels, class_names = table.columns[label_column], table.class_names.get(label_column, ())
            unusable = (
                describe_other_than_numbers(labels)
                if encoder is None
                else encoder.describe_unknown(labels, class_names)
            )
            if unusable:
                problems.append(f"split {name!r}, column {label_column!r}: {unusable}")
            problems.extend(_find_other_than_text({column: table.columns[column] for column in text_columns}, name))
            if not labels:
                problems.append(f"split {name!r} is empty")
    if encoder is not None and encoder.remark:
        logger.warning(f"{name_dataset(dataset)}: column {label_column!r} {encoder.remark}")
    splits = []
    for table in tables.values():
        labels, class_names = table.columns[label_column], table.class_names.get(label_column, ())
        texts = tuple([str(value) for value in table.columns[column]] for column in text_columns)
        encoded = encode_numbers(labels) if encoder is None else encoder.encode(labels, class_names)
        splits.append(make_split(texts, encoded))
    return () if encoder is None else encoder.names, splits


def _find_other_than_text(columns: Mapping[str, Sequence[object]], split: str) -> Iterator[str]:
    for column, values in columns.items():
        bad = [row for row, value in enumerate(values) if not _is_text(value)]
        if bad:
            first = f"first row {bad[0]}: {shorten(values[bad[0]])}"
            yield f"split {split!r}, column {column!r}: {len(bad)} rows are not text, {first}"


_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_text(value: object) -> bool:
    """Return whether a value is text that a tokenizer can read: no half of a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _load_table(dataset: DatasetSettings, split: str) -> Table:
    folder = expand_home(dataset.name)
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
        if is_path(dataset.name):
            raise UserError(f"run.dataset.name = {dataset.name!r}: there is no folder {folder}")
        return _fetch(dataset, dataset.name, dataset.subset, split=split, revision=dataset.revision)
    named = [path for path in sorted(folder.iterdir()) if path.stem == split and path.suffix.lower() in READERS]
    if len(named) > 1:
        raise UserError(f"{folder} holds several files for split {split!r}: {', '.join(path.name for path in named)}")
    if named:
        return read_table_file(named[0])
    # The library's cache goes by path and time, and it takes a path for a pattern: here both are plain and new.
    with tempfile.TemporaryDirectory(prefix="fwlora-data-") as scratch:
        plain = Path(scratch) / "folder"
        try:
            shutil.copytree(folder, plain, copy_function=_link_or_copy)
        except (OSError, shutil.Error) as error:
            raise UserError(
                f"run.dataset.name = {dataset.name!r} cannot be read by way of {scratch} ({error}); set TMPDIR to a "
                "folder with room for it"
            ) from None
        return _fetch(
            dataset, str(plain), dataset.subset, split=split, cache_dir=f"{scratch}/cache", keep_in_memory=True
        )


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or a link of a link
        shutil.copyfile(source, target)


def _fetch(dataset: DatasetSettings, *arguments: Any, cache_dir: str = CACHE_DIR, **options: Any) -> Table:
    """Call ``datasets.load_dataset`` and turn every failure into one message."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    local = expand_home(dataset.name).exists()
    try:
        loaded = datasets.load_dataset(*arguments, cache_dir=cache_dir, **options)
        names = {name: kind.names for name, kind in loaded.features.items() if getattr(kind, "names", None)}
        # A slice is read at once, where an iteration would read row by row.
        return Table({name: list(loaded[name][:]) for name in loaded.column_names}, names)
    except Exception as error:  # datasets raises over twenty types here, several of them third-party
        unusable = explain_loader_error(error)
        if unusable and not local:
            raise UserError(f"run.dataset.name = {dataset.name!r} cannot be loaded: {unusable}") from None
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no details'}"
        expected = (
            f"one in the Hub's layout, or one with {dataset.split}.csv and {dataset.eval_split}.csv (or .tsv, .json, "
            ".jsonl, .parquet), in UTF-8"
        )
        remedy = f"the folder must be {expected}" if local else f"without the Hub give a local folder: {expected}"
        subset = f", subset {dataset.subset!r}," if dataset.subset else ""
        raise UserError(f"run.dataset.name = {dataset.name!r}{subset} cannot be loaded ({reason}); {remedy}") from None
