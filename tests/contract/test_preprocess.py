"""The task that a run's ``dataset`` node names, whole: source, columns, labels, limits."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fwlora.experiment.data.text import split_heldout
from fwlora.experiment.errors import UserError
from src.preprocess import load_task
from tests.helpers.dataset_settings import make_dataset
from tests.helpers.paths import REPOSITORY

ROWS = pd.DataFrame({"sentence": [f"row {i}" for i in range(6)], "label": [0, 1, 0, 1, 1, 0]})


def write(folder, form: str, train: pd.DataFrame = ROWS, validation: pd.DataFrame | None = None):
    validation = ROWS.head(4) if validation is None else validation
    for split, frame in (("train", train), ("validation", validation)):
        path = folder / f"{split}.{form}"
        if form == "csv":
            frame.to_csv(path, index=False)
        elif form == "tsv":
            frame.to_csv(path, index=False, sep="\t")
        elif form == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=True)
    return folder


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_of_ones_own(tmp_path, form):
    data = load_task(make_dataset(write(tmp_path, form)))
    assert data.train.texts == ([f"row {i}" for i in range(6)],)
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1, 0] and data.evaluation.labels.tolist() == [0, 1, 0, 1]
    assert data.label_names == ("0", "1") and data.task_metric == "accuracy"


def test_hub_layout_folder(tiny_glue):
    data = load_task(make_dataset(tiny_glue, subset="cola"))
    expected = pd.read_parquet(tiny_glue / "cola" / "train-00000-of-00001.parquet")
    assert data.train.texts[0] == expected.sentence.tolist() and data.train.labels.tolist() == expected.label.tolist()
    assert (data.task, data.task_metric) == ("cola", "matthews_correlation")


def test_glue_copy(glue_folder):
    for subset, rows, positive in (("sst2", (67_349, 872), 37_569), ("cola", (8_551, 1_043), 6_023)):
        data = load_task(make_dataset(glue_folder, subset=subset))
        assert (len(data.train.labels), len(data.evaluation.labels)) == rows
        assert data.train.labels.sum() == positive
    assert data.label_names == ("unacceptable", "acceptable")


def test_string_labels_and_named_columns(tmp_path):
    frame = pd.DataFrame({"claim": ["a", "b", "c"], "verdict": ["no", "yes", "maybe"]})
    write(tmp_path, "csv", frame, frame)
    data = load_task(make_dataset(tmp_path, text_columns=["claim"], label_column="verdict"))
    assert data.label_names == ("maybe", "no", "yes") and data.train.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("train", "options", "expected"),
    [
        (ROWS.rename(columns={"sentence": "body"}), {}, ["no text column found", "body", "run.dataset.text_columns"]),
        (ROWS, {"label_column": "gold"}, ["split 'train' has no column gold", "split 'validation' has no column gold"]),
        (ROWS, {"text_columns": ["a", "b"]}, ["has no column a, b; it has sentence, label"]),
        (ROWS.assign(label=0), {}, ["column 'label' has 1 class (0); 2 to 256 classes can be learnt"]),
        (ROWS.assign(label=[0.5] * 6), {}, ["neither integers nor text"]),
        (ROWS.assign(sentence=range(6)), {}, ["split 'train', column 'sentence': 6 rows are not text, first row 0: 0"]),
    ],
)
def test_bad_data_is_named(tmp_path, train, options, expected):
    write(tmp_path, "parquet", train)
    with pytest.raises(UserError) as caught:
        load_task(make_dataset(tmp_path, **options))
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_a_table_without_rows_is_empty_and_nothing_else(tmp_path):
    write(tmp_path, "csv", ROWS[:0], ROWS)
    with pytest.raises(UserError) as caught:
        load_task(make_dataset(tmp_path))
    assert "split 'train' is empty" in str(caught.value) and "column" not in str(caught.value)


def test_quotation_marks_in_tsv_are_text(tmp_path):
    lines = 'sentence\tlabel\nan "unbalanced quote\t0\n"another\t1\nplain\t0\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text(lines)
    data = load_task(make_dataset(tmp_path))
    assert data.train.texts == (['an "unbalanced quote', '"another', "plain"],)
    assert data.train.labels.tolist() == [0, 1, 0]


PAIRS = pd.DataFrame({"sentence1": list("abcd"), "sentence2": list("efgh"), "label": [0.0, 3.8, 5.0, 2.5]})


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_a_task_of_numbers(tmp_path, form):
    data = load_task(make_dataset(write(tmp_path, form, PAIRS, PAIRS), subset="stsb", train_examples=3))
    assert data.evaluation.texts == (list("abcd"), list("efgh")) and data.label_names == ()
    assert data.evaluation.labels.dtype == np.float32 and data.evaluation.labels.tolist() == pytest.approx(PAIRS.label)
    assert (data.task, data.task_metric, len(data.train.labels)) == ("stsb", "pearson_correlation", 3)
    rest, heldout = split_heldout(data.train, 0.4, 0)
    assert sorted([*rest.labels, *heldout.labels]) == sorted(data.train.labels)


def test_whole_numbers_are_numbers_too(tmp_path):
    frame = PAIRS.assign(label=[0, 3, 5, 300])
    data = load_task(make_dataset(write(tmp_path, "parquet", frame, frame), subset="stsb"))
    assert data.train.labels.dtype == np.float32 and data.train.labels.tolist() == [0, 3, 5, 300]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.0, 3.8, None, 2.5], "split 'train', column 'label': 1 labels are no finite numbers, first row 2: None"),
        ([0.0, 3.8, float("inf"), 2.5], "no finite numbers, first row 2: inf"),
        ([0.0, 1e300, 1.0, 2.5], r"no finite numbers, first row 1: 1e\+300"),
        (["0", "1", "2", "x"], "1 labels are no finite numbers, first row 3: 'x'"),
        ([True, False, True, True], "4 labels are no finite numbers, first row 0: True"),
        ([-1.0] * 4, "every label is -1.0; -1 marks the hidden labels of a GLUE test split"),
    ],
)
def test_labels_that_are_no_numbers(tmp_path, labels, expected):
    write(tmp_path, "parquet", PAIRS.assign(label=labels), PAIRS)
    with pytest.raises(UserError, match=expected):
        load_task(make_dataset(tmp_path, subset="stsb"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", "b", "c", 0, 1, 2], "mixes integers and text, such as 0, 'a'"),
        ([[0]] * 6, "neither integers nor text"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, expected):
    frame = pd.DataFrame({"sentence": list("abcdef"), "label": labels})
    with pytest.raises(UserError, match=expected):
        load_task(make_dataset(write(tmp_path, "json", frame, frame)))


def test_the_embedded_task_has_its_two_splits():
    with pytest.raises(UserError, match="has the splits 'train' and 'validation'"):
        load_task(make_dataset("acceptability", eval_split="test"))


def test_missing_split_folder_and_hub(tmp_path):
    (tmp_path / "train.csv").write_text(ROWS.to_csv(index=False))
    with pytest.raises(UserError, match=r"validation\.csv"):
        load_task(make_dataset(tmp_path))
    with pytest.raises(UserError, match="is a single file; give the folder"):
        load_task(make_dataset(tmp_path / "train.csv"))
    with pytest.raises(UserError, match=r"cannot be loaded .* give a local folder"):
        load_task(make_dataset("nowhere/at-all"))
    with pytest.raises(UserError, match=r"'ax' is no GLUE task; choose one of cola, sst2, .*stsb"):
        load_task(make_dataset("glue", subset="ax"))
    with pytest.raises(UserError, match=r"'glue', subset 'cola', cannot be loaded"):
        load_task(make_dataset("glue", subset="cola"))


@pytest.mark.network
def test_the_hubs_glue_is_what_the_settings_name():
    code = (
        "from tests.helpers.dataset_settings import make_dataset; from src.preprocess import load_task; "
        "data = load_task(make_dataset('glue', subset='cola')); print(len(data.train.labels), data.label_names)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[-2] == "8551 ('unacceptable', 'acceptable')"


def test_embedded_task_is_balanced_and_needs_no_files():
    data = load_task(make_dataset("acceptability", train_examples=50))
    assert len(data.train.labels) == 50 and data.evaluation.labels.mean() == 0.5
    assert data.label_names == ("unacceptable", "acceptable") and data.task_metric == "matthews_correlation"
