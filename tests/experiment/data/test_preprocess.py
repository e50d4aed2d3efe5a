from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.schema import DatasetSettings
from src.preprocess import draw_subset, load_task, make_split, split_heldout, tokenize
from tests.helpers.paths import REPOSITORY


def dataset(name: str, **options) -> DatasetSettings:
    defaults = {
        "subset": None, "revision": None, "split": "train", "eval_split": "validation", "max_length": 128,
        "padding": "max_length", "truncation": True, "text_columns": None, "label_column": "label",
        "train_examples": None, "eval_examples": None, "subset_seed": 0,
    }  # fmt: skip
    return DatasetSettings(name=str(name), **{**defaults, **options})


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
    data = load_task(dataset(write(tmp_path, form)))
    assert data.train.texts == ([f"row {i}" for i in range(6)],)
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1, 0] and data.evaluation.labels.tolist() == [0, 1, 0, 1]
    assert data.label_names == ("0", "1") and data.task_metric == "accuracy"


def test_hub_layout_folder(tiny_glue):
    data = load_task(dataset(tiny_glue, subset="cola"))
    expected = pd.read_parquet(tiny_glue / "cola" / "train-00000-of-00001.parquet")
    assert data.train.texts[0] == expected.sentence.tolist() and data.train.labels.tolist() == expected.label.tolist()
    assert (data.task, data.task_metric) == ("cola", "matthews_correlation")


def test_glue_copy(glue_folder):
    for subset, rows, positive in (("sst2", (67_349, 872), 37_569), ("cola", (8_551, 1_043), 6_023)):
        data = load_task(dataset(glue_folder, subset=subset))
        assert (len(data.train.labels), len(data.evaluation.labels)) == rows
        assert data.train.labels.sum() == positive
    assert data.label_names == ("unacceptable", "acceptable")


def test_string_labels_and_named_columns(tmp_path):
    frame = pd.DataFrame({"claim": ["a", "b", "c"], "verdict": ["no", "yes", "maybe"]})
    write(tmp_path, "csv", frame, frame)
    data = load_task(dataset(tmp_path, text_columns=["claim"], label_column="verdict"))
    assert data.label_names == ("maybe", "no", "yes") and data.train.labels.tolist() == [1, 2, 0]


def test_pairs(tmp_path, minilm):
    frame = pd.DataFrame({"sentence1": ["a cat", "dogs"], "sentence2": ["no", "yes it is"], "label": [0, 1]})
    settings = dataset(write(tmp_path, "csv", frame, frame))
    data = load_task(settings)
    from fwlora.experiment.modeling.pretrained import resolve_pretrained

    tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained(minilm, "model"))
    split = tokenize(data.train, tokenizer, settings)
    single = tokenizer("a cat", "no")
    assert split.tokens[: split.offsets[1]].tolist() == single["input_ids"]
    assert split.segments[: split.offsets[1]].tolist() == single["token_type_ids"] and 1 in single["token_type_ids"]


@pytest.mark.parametrize(
    ("train", "options", "expected"),
    [
        (ROWS.rename(columns={"sentence": "body"}), {}, ["no text column found", "body", "run.dataset.text_columns"]),
        (ROWS, {"label_column": "gold"}, ["split 'train' has no column gold", "split 'validation' has no column gold"]),
        (ROWS, {"text_columns": ["a", "b"]}, ["has no column a, b; it has sentence, label"]),
        (ROWS.assign(label=[0, 1, 0, 1, 1, -1]), {}, ["split 'train'", "outside the classes 0, 1, first row 5: -1"]),
        (ROWS.assign(label=0), {}, ["has 1 classes", "split 'validation'", "outside the classes 0, first row 1: 1"]),
        (ROWS.assign(label=[0.5] * 6), {}, ["neither integers nor strings"]),
        (ROWS.assign(sentence=range(6)), {}, ["split 'train', column 'sentence': 6 rows are not text, first row 0: 0"]),
    ],
)
def test_bad_data_is_named(tmp_path, train, options, expected):
    write(tmp_path, "parquet", train)
    with pytest.raises(UserError) as caught:
        load_task(dataset(tmp_path, **options))
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_quotation_marks_in_tsv_are_text(tmp_path):
    lines = 'sentence\tlabel\nan "unbalanced quote\t0\n"another\t1\nplain\t0\n'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text(lines)
    data = load_task(dataset(tmp_path))
    assert data.train.texts == (['an "unbalanced quote', '"another', "plain"],)
    assert data.train.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 0, 1, 1, 10**12], "has labels up to 1000000000000; 2 to 256"),
        ([[0]] * 6, "neither integers nor strings"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, expected):
    frame = pd.DataFrame({"sentence": list("abcdef"), "label": labels})
    with pytest.raises(UserError, match=expected):
        load_task(dataset(write(tmp_path, "json", frame, frame)))


def test_the_embedded_task_has_its_two_splits():
    with pytest.raises(UserError, match="has the splits 'train' and 'validation'"):
        load_task(dataset("acceptability", eval_split="test"))


def test_missing_split_folder_and_hub(tmp_path):
    (tmp_path / "train.csv").write_text(ROWS.to_csv(index=False))
    with pytest.raises(UserError, match=r"validation\.csv"):
        load_task(dataset(tmp_path))
    with pytest.raises(UserError, match="is a single file; give the folder"):
        load_task(dataset(tmp_path / "train.csv"))
    with pytest.raises(UserError, match=r"cannot be loaded .* give a local folder"):
        load_task(dataset("nowhere/at-all"))
    with pytest.raises(UserError, match="'stsb' is not a GLUE classification task; choose one of cola, sst2"):
        load_task(dataset("glue", subset="stsb"))
    with pytest.raises(UserError, match=r"'glue', subset 'cola', cannot be loaded"):
        load_task(dataset("glue", subset="cola"))


@pytest.mark.network
def test_the_hubs_glue_is_what_the_settings_name():
    code = (
        "from tests.experiment.data.test_preprocess import dataset; from src.preprocess import load_task; "
        "data = load_task(dataset('glue', subset='cola')); print(len(data.train.labels), data.label_names)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[-2] == "8551 ('unacceptable', 'acceptable')"


def test_subsets_are_fixed_and_keep_their_order(tmp_path):
    labels = np.arange(100) % 2
    split = make_split(([f"t{i}" for i in range(100)],), labels)
    part = draw_subset(split, 30, 0)
    order = [int(text[1:]) for text in part.texts[0]]
    assert order == sorted(order) and len(order) == 30 and part.labels.tolist() == [i % 2 for i in order]
    assert draw_subset(split, 30, 0).fingerprint == part.fingerprint != draw_subset(split, 30, 1).fingerprint
    assert draw_subset(split, None, 0) is split and draw_subset(split, 100, 0) is split


def test_heldout_part_is_stratified_fixed_and_disjoint():
    labels = np.array([0] * 300 + [1] * 700)
    split = make_split(([f"t{i}" for i in range(1000)],), labels)
    rest, heldout = split_heldout(split, 0.1, 3)
    assert heldout.labels.tolist().count(0) == 30 and len(heldout.labels) == 100
    assert set(rest.texts[0]).isdisjoint(heldout.texts[0]) and len(rest.labels) == 900
    assert split_heldout(split, 0.1, 3)[1].fingerprint == heldout.fingerprint
    with pytest.raises(UserError, match=r"heldout_fraction = 0\.1 of 2 training examples"):
        split_heldout(make_split((["a", "b"],), np.array([0, 1])), 0.1, 0)


def test_fingerprint_is_of_texts_and_labels_in_order():
    base = make_split((["a", "b"],), np.array([0, 1])).fingerprint
    assert base == hashlib.sha256(b"('a', 0)('b', 1)").hexdigest()[:16]
    others = [(["b", "a"], [0, 1]), (["a", "b"], [1, 1]), (["a", "c"], [0, 1])]
    assert all(make_split((texts,), np.array(labels)).fingerprint != base for texts, labels in others)


def test_max_length_is_a_cap(tiny_roberta):
    split = make_split((["the cat sees the dog again and again"],), np.array([0]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    assert tokenize(split, tokenizer, dataset("x", max_length=5)).lengths.tolist() == [5]
    with pytest.raises(UserError, match="truncation is false and example 0 has"):
        tokenize(split, tokenizer, dataset("x", max_length=5, truncation=False))


def test_tokens_on_disk_are_those_of_this_tokenizer_and_these_settings(tiny_roberta, tmp_path):
    split = make_split((["the cat sees the dog", "no one knows"],), np.array([0, 1]))
    for side in ("right", "left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_roberta, truncation_side=side)
        for length in (6, 4, 6):
            got = tokenize(split, tokenizer, dataset("x", max_length=length))
            expected = tokenizer(*split.texts, truncation=True, max_length=length)["input_ids"]
            assert got.tokens.tolist() == [token for row in expected for token in row]
    assert len(list((tmp_path / ".cache" / "tokens").iterdir())) == 4


def test_texts_without_a_token_are_refused(tiny_roberta):
    class Bare:
        """A tokenizer that adds no special tokens, and whose settings cannot be told."""

        def __call__(self, texts, **options):
            return {"input_ids": [[7] * len(text.split()) for text in texts]}

    split = make_split((["a b", "", ""],), np.array([0, 1, 0]))
    with pytest.raises(UserError, match="2 texts have no token, the first is example 1"):
        tokenize(split, Bare(), dataset("x"))


def test_embedded_task_is_balanced_and_needs_no_files():
    data = load_task(dataset("acceptability", train_examples=50))
    assert len(data.train.labels) == 50 and data.evaluation.labels.mean() == 0.5
    assert data.label_names == ("unacceptable", "acceptable") and data.task_metric == "matthews_correlation"
