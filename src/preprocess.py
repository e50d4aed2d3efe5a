"""Data: from a GLUE task, a local folder or files of one's own to tokenised splits with checked labels."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from sklearn.model_selection import train_test_split

from fwlora.experiment.data import acceptability
from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.token_cache import cached_tokens
from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.schema import DatasetSettings
from fwlora.experiment.tracking import metrics

CACHE_DIR = ".cache/"
GLUE_HUB_ID = "nyu-mll/glue"
EMBEDDED_TASK = "acceptability"
GLUE_TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
OWN_TEXT_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"))
MOST_CLASSES = 256
FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSplit:
    """One split as text.

    Attributes:
        texts: one column per sentence of an example, each of n strings.
        labels: classes, shape (n,).
        fingerprint: hash of texts and labels in order.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    fingerprint: str

    def select(self, indices: np.ndarray) -> TextSplit:
        """The given examples, in the given order."""
        return make_split(tuple([column[i] for i in indices] for column in self.texts), self.labels[indices])


@dataclass(frozen=True)
class TaskData:
    """A classification task ready for training."""

    task: str
    label_names: tuple[str, ...]
    task_metric: str
    train: TextSplit
    evaluation: TextSplit


def make_split(texts: tuple[list[str], ...], labels: np.ndarray) -> TextSplit:
    """A split with its fingerprint."""
    digest = hashlib.sha256()
    for row in zip(*texts, labels.tolist(), strict=True):
        digest.update(repr(row).encode())
    return TextSplit(texts, labels, digest.hexdigest()[:16])


def load_task(dataset: DatasetSettings) -> TaskData:
    """Loads and checks both splits.

    ``dataset.name`` is ``glue`` (the Hub's, cached in ``.cache/``), the embedded task ``acceptability``, any other Hub
    id, or a local folder: in the Hub's layout, or with files named by split (``train.csv``, ``validation.parquet``).

    Raises:
        UserError: data that cannot be fetched, splits or columns that are missing, labels outside the classes.
    """
    if dataset.name == EMBEDDED_TASK:
        return _limit(_embedded_task(dataset), dataset)
    names = (dataset.split, dataset.eval_split)
    if names[0] == names[1]:
        raise UserError(f"run.dataset.split and run.dataset.eval_split are both {names[0]!r}; name two splits")
    tables = {name: _load_table(dataset, name) for name in names}
    problems: list[str] = []
    text_columns = _text_columns(dataset, tables[dataset.split].column_names, problems)
    for name, table in tables.items():
        missing = [c for c in (*text_columns, dataset.label_column) if c not in table.column_names]
        if missing:
            problems.append(
                f"split {name!r} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}"
            )
    _raise(dataset, problems)
    label_names, encode = _label_encoding(tables[dataset.split], dataset, problems)
    splits = []
    for name, table in tables.items():
        labels = encode(table[dataset.label_column], name, problems)
        texts = tuple(_text_column(table, column, name, problems) for column in text_columns)
        if len(table) == 0:
            problems.append(f"split {name!r} is empty")
        splits.append((texts, labels))
    _raise(dataset, problems)
    (train_texts, train_labels), (eval_texts, eval_labels) = splits
    task = dataset.subset or Path(dataset.name).name
    data = TaskData(
        task,
        label_names,
        metrics.primary_task_metric(dataset.subset),
        make_split(train_texts, train_labels),
        make_split(eval_texts, eval_labels),
    )
    return _limit(data, dataset)


def split_heldout(split: TextSplit, fraction: float, seed: int) -> tuple[TextSplit, TextSplit]:
    """(rest, held-out part): stratified by label, the same for equal seed, whatever the training seed.

    Raises:
        UserError: too few examples of some class to be in both parts.
    """
    indices = np.arange(len(split.labels))
    try:
        rest, heldout = train_test_split(indices, test_size=fraction, random_state=seed, stratify=split.labels)
    except ValueError as error:
        raise UserError(
            f"run.optuna.heldout_fraction = {fraction} of {len(indices)} training examples cannot be held out: {error}"
        ) from None
    return split.select(np.sort(rest)), split.select(np.sort(heldout))


def draw_subset(split: TextSplit, examples: int | None, seed: int) -> TextSplit:
    """A random part of the split in its original order; the whole split where ``examples`` is None or not smaller."""
    if examples is None or examples >= len(split.labels):
        return split
    chosen = np.random.default_rng(seed).permutation(len(split.labels))[:examples]
    return split.select(np.sort(chosen))


def tokenize(split: TextSplit, tokenizer: Any, dataset: DatasetSettings) -> TokenizedSplit:
    """Token ids of every example, cut at ``max_length`` where truncation is on; kept in ``.cache/tokens``.

    Raises:
        UserError: an example is longer than ``max_length`` and truncation is off.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    key = None
    if backend is not None:
        padding_and_truncation_aside = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        key = [
            tokenizers.__version__, transformers.__version__, type(tokenizer).__name__,
            json.dumps(padding_and_truncation_aside), tokenizer.truncation_side, tokenizer.split_special_tokens,
            tokenizer.model_input_names, split.fingerprint, dataset.max_length, dataset.truncation,
        ]  # fmt: skip
    return cached_tokens(Path(CACHE_DIR) / "tokens", key, lambda: _tokenize(split, tokenizer, dataset))


def _tokenize(split: TextSplit, tokenizer: Any, dataset: DatasetSettings) -> TokenizedSplit:
    encoded = tokenizer(*split.texts, truncation=dataset.truncation, max_length=dataset.max_length, padding=False)
    ids = encoded["input_ids"]
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    if lengths.min() == 0:
        raise UserError(
            f"data set {dataset.name!r}: {int((lengths == 0).sum())} texts have no token, the first is example "
            f"{int(lengths.argmin())} of its split; remove empty texts"
        )
    if lengths.max() > dataset.max_length and dataset.truncation:
        raise UserError(
            f"run.dataset.max_length = {dataset.max_length} leaves no room for text beside the special tokens; raise it"
        )
    if lengths.max() > dataset.max_length:
        raise UserError(
            f"run.dataset.truncation is false and example {int(lengths.argmax())} has {lengths.max()} tokens; "
            f"raise run.dataset.max_length above {dataset.max_length} or allow truncation"
        )
    segments = None
    if "token_type_ids" in encoded:
        segments = np.concatenate([np.asarray(row, dtype=np.int8) for row in encoded["token_type_ids"]])
        segments = segments if segments.any() else None
    tokens = np.concatenate([np.asarray(row, dtype=np.int32) for row in ids])
    return TokenizedSplit(tokens, segments, np.concatenate([[0], np.cumsum(lengths)]), split.labels)


def _embedded_task(dataset: DatasetSettings) -> TaskData:
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


def _limit(data: TaskData, dataset: DatasetSettings) -> TaskData:
    return TaskData(
        data.task,
        data.label_names,
        data.task_metric,
        draw_subset(data.train, dataset.train_examples, dataset.subset_seed),
        draw_subset(data.evaluation, dataset.eval_examples, dataset.subset_seed),
    )


def _raise(dataset: DatasetSettings, problems: Sequence[str]) -> None:
    if problems:
        raise UserError.collect(
            f"data set {dataset.name!r}" + (f", {dataset.subset}" if dataset.subset else ""), problems
        )


def _load_table(dataset: DatasetSettings, split: str) -> Any:
    """One split as a ``datasets.Dataset``."""
    folder = Path(dataset.name)
    if dataset.name == "glue":
        if dataset.subset not in GLUE_TEXT_COLUMNS:
            raise UserError(
                f"run.dataset.subset = {dataset.subset!r} is not a GLUE classification task; "
                f"choose one of {', '.join(GLUE_TEXT_COLUMNS)}"
            )
        return _load(lambda load: load(GLUE_HUB_ID, dataset.subset, split=split, revision=dataset.revision), dataset)
    if folder.is_file():
        raise UserError(
            f"run.dataset.name = {dataset.name!r} is a single file; give the folder that holds one file per split, "
            f"named {dataset.split}{folder.suffix} and {dataset.eval_split}{folder.suffix}"
        )
    if not folder.is_dir():
        return _load(lambda load: load(dataset.name, dataset.subset, split=split, revision=dataset.revision), dataset)
    named = [path for path in sorted(folder.iterdir()) if path.stem == split and path.suffix in FILE_FORMATS]
    if len(named) > 1:
        raise UserError(f"{folder} holds several files for split {split!r}: {', '.join(path.name for path in named)}")
    if named:
        # Quotation marks in a .tsv are text: GLUE's own files hold unbalanced ones.
        options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if named[0].suffix == ".tsv" else {}
        file_format = FILE_FORMATS[named[0].suffix]
        return _load(lambda load: load(file_format, data_files=str(named[0]), split="train", **options), dataset)
    return _load(lambda load: load(str(folder), dataset.subset, split=split), dataset)


def _load(call: Callable[[Callable[..., Any]], Any], dataset: DatasetSettings) -> Any:
    """Runs ``datasets.load_dataset``, with every failure as one message."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    local = Path(dataset.name).exists()
    try:
        return call(lambda *args, **options: datasets.load_dataset(*args, cache_dir=CACHE_DIR, **options))
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


def _text_columns(dataset: DatasetSettings, available: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    if dataset.text_columns:
        return tuple(dataset.text_columns)
    candidates = [GLUE_TEXT_COLUMNS[dataset.subset]] if dataset.subset in GLUE_TEXT_COLUMNS else []
    for columns in (*candidates, *OWN_TEXT_COLUMNS):
        if all(column in available for column in columns):
            return columns
    expected = " or ".join("+".join(columns) for columns in (*candidates, *OWN_TEXT_COLUMNS))
    problems.append(
        f"no text column found: expected {expected}, found {', '.join(available)}; name it by run.dataset.text_columns"
    )
    return ()


def _text_column(table: Any, column: str, split: str, problems: list[str]) -> list[str]:
    values = list(table[column])
    bad = [row for row, value in enumerate(values) if not isinstance(value, str)]
    if bad:
        problems.append(
            f"split {split!r}, column {column!r}: {len(bad)} rows are not text, first row {bad[0]}: {values[bad[0]]!r}"
        )
    return values


def _label_encoding(
    train: Any, dataset: DatasetSettings, problems: list[str]
) -> tuple[tuple[str, ...], Callable[[Sequence[Any], str, list[str]], np.ndarray]]:
    """Class names, and how a label column becomes classes; the classes are those that the training split declares."""
    feature = train.features[dataset.label_column]
    values = [value for value in train[dataset.label_column] if value is not None]
    declared = getattr(feature, "names", None)
    classes: Mapping[Any, int]
    if declared:
        names = tuple(declared)
        classes = {index: index for index in range(len(names))}
    elif values and all(isinstance(value, int) for value in values):
        names = tuple(str(index) for index in range(min(max(values), MOST_CLASSES) + 1))
        classes = {index: index for index in range(len(names))}
    elif values and all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
        classes = {name: index for index, name in enumerate(names)}
    else:
        problems.append(
            f"column {dataset.label_column!r} holds neither integers nor strings, but {values[:1]}; labels are classes"
        )
        names, classes = ("0", "1"), {}
    if not 2 <= len(names) <= MOST_CLASSES:
        count = f"labels up to {max(values)}" if names[-1] == str(MOST_CLASSES) else f"{len(names)} classes"
        problems.append(f"column {dataset.label_column!r} has {count}; 2 to {MOST_CLASSES} classes can be learnt")

    def encode(column: Sequence[Any], split: str, problems: list[str]) -> np.ndarray:
        outside = [
            (row, value) for row, value in enumerate(column) if not isinstance(value, int | str) or value not in classes
        ]
        if outside and classes:
            row, value = outside[0]
            hidden = "; -1 marks the hidden labels of a GLUE test split" if value == -1 else ""
            problems.append(
                f"split {split!r}, column {dataset.label_column!r}: {len(outside)} labels outside the classes "
                f"{', '.join(names[:10])}, first row {row}: {value!r}{hidden}"
            )
        rows = {row for row, _ in outside}
        return np.array([0 if row in rows else classes[value] for row, value in enumerate(column)], dtype=np.int64)

    return names, encode
