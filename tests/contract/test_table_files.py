"""Files of one's own are read as they are: dialects, shapes, missing values, encodings, content rather than time."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwlora.experiment.data.table_files import read_table_file
from fwlora.experiment.errors import UserError
from src.preprocess import load_task
from tests.helpers.dataset_settings import make_dataset

ROWS = [("a", "0"), ("b", "1"), ("c", "0"), ("d", "1")]


def write_split(folder, name: str, rows, ending: str = "csv", columns=("text", "label"), **options) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t" if ending.lower() == "tsv" else ",", **options)
    writer.writerows([columns, *rows])
    (folder / f"{name}.{ending}").write_bytes(buffer.getvalue().encode())


def read(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table_file(path)


def texts_of(folder, **options) -> list[str]:
    return load_task(make_dataset(folder, **options)).train.texts[0]


def test_files_with_the_names_and_times_of_others_are_read_anew(tmp_path):
    for rows in (ROWS, [(f"other {text}", label) for text, label in ROWS]):
        for split in ("train", "validation"):
            write_split(tmp_path, split, rows)
            os.utime(tmp_path / f"{split}.csv", (1_700_000_000, 1_700_000_000))
        assert texts_of(tmp_path) == [text for text, _ in rows]


def test_so_are_files_in_the_hubs_layout(tmp_path):
    for word in ("one", "two"):
        for split in ("train", "validation"):
            path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            pd.DataFrame({"text": [f"{word} {i}" for i in range(4)], "label": [0, 1, 0, 1]}).to_parquet(path)
            os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(tmp_path) == [f"{word} {i}" for i in range(4)]


@pytest.mark.parametrize("name", ["star*", "x[1]", "q?", "a{b,c}", "plain", "with space", "~tilde"])
@pytest.mark.parametrize("layout", ["files", "hub"])
def test_a_folder_is_taken_as_it_is_named(tmp_path, name, layout):
    for folder, word in ((name, "mine"), ("starfish", "other"), ("x1", "other"), ("qq", "other"), ("ab", "other")):
        place = tmp_path / folder / ("" if layout == "files" else "data")
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            frame = pd.DataFrame({"text": [f"{word} {i}" for i in range(4)], "label": [0, 1, 0, 1]})
            frame.to_parquet(place / (f"{split}.parquet" if layout == "files" else f"{split}-00000-of-00001.parquet"))
    assert texts_of(tmp_path / name) == [f"mine {i}" for i in range(4)]


def test_a_home_folder_and_endings_in_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write_split(tmp_path / "data", split, ROWS, "CSV")
    assert texts_of("~/data") == ["a", "b", "c", "d"]
    for missing in ("~/nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(UserError, match="there is no folder"):
            load_task(make_dataset(missing))


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quoted_tsv_is_read_as_quoted(tmp_path, quoting):
    rows = [('say "hi"', "0"), ("a\ttab", "1"), ('"whole"', "0"), ("two\nlines", "1"), ("plain", "0")]
    for split in ("train", "validation"):
        write_split(tmp_path, split, rows, "tsv", quoting=quoting)
    assert texts_of(tmp_path) == [text for text, _ in rows]


def test_glues_unquoted_tsv_is_read_as_it_is(tmp_path):
    lines = ['"balanced"', '"unbalanced', 'mid "quote', "plain", 'a "" b', "\x0bvertical \x85 tab\u2028"]
    content = "text\tlabel\n" + "".join(f"{line}\t{i % 2}\n" for i, line in enumerate(lines))
    assert read(tmp_path, "train.tsv", content).columns["text"] == lines
    # Two rows whose quotation marks would join them, and a file with Windows' line ends.
    joined = 'text\tlabel\r\n"one\t0\r\ntwo"\t1\r\n'
    assert read(tmp_path, "train.tsv", joined).columns == {"text": ['"one', 'two"'], "label": ["0", "1"]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.sampled_from(["x", "y"])),
        min_size=1,
    ),
    st.sampled_from(["csv", "tsv"]),
)
def test_what_a_csv_writer_wrote_comes_back(tmp_path_factory, rows, ending):
    folder = tmp_path_factory.mktemp("rows")
    write_split(folder, "train", rows, ending, quoting=csv.QUOTE_ALL)
    columns = read_table_file(folder / f"train.{ending}").columns
    assert columns == {"text": [text or None for text, _ in rows], "label": [label for _, label in rows]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "text,label\ngood, movie 0,neg\n", r"line 2 has 3 fields, and the first line names 2 columns"),
        ("t.csv", "text,label\na,0\n\nb\n", "line 4 has 1 fields"),
        ("t.tsv", "text\tlabel\na\tb\t0\n", "line 2 has 3 fields"),
        ("t.csv", "text,label,text\na,0,b\n", "names column 'text' 2 times"),
        ("t.csv", 'text,label\n"a"b,0\n', "line 2: .* enclose fields as CSV does"),
        ("t.csv", 'text,label\n"a,0\n', "line 2: unexpected end of data"),
        ("t.csv", "", "it is empty; its first line names the columns"),
        ("t.tsv", "\n\n", "it is empty"),
        ("t.csv", b"text,label\ncaf\xe9,0\n", "byte 14 is no UTF-8"),
        ("t.jsonl", b'{"text": "caf\xe9"}\n', "byte 13 is no UTF-8"),
        ("t.jsonl", '{"text": "a", "text": "b"}\n', "line 1: an object has the key 'text' more than once"),
        ("t.jsonl", '{"text": "a"}\n[1]\n', "line 2 is no object with a key per column, but '\\[1\\]'"),
        ("t.jsonl", '{"text": "a"\n', "line 1 is no JSON .* at character 12"),
        ("t.jsonl", "", "it holds no objects"),
        ("t.json", "[" * 100_000, "nested too deep|is no JSON"),
        ("t.json", "[1, 2]", "entry 0 is no object"),
        ("t.json", '{"text": {"0": "a"}', "line 1 is no JSON"),
        ("t.parquet", "not parquet", "it is no Parquet file"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path, name, content, expected):
    with pytest.raises(UserError, match=expected) as caught:
        read(tmp_path, name, content)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_words_are_words_and_only_empty_is_empty(tmp_path):
    words = ["null", "NA", "None", "n/a", "nan", "1000", "1e5", "True", " ", "-"]
    for ending in ("csv", "tsv"):
        for split in ("train", "validation"):
            write_split(tmp_path, split, [(word, "EU" if i % 2 else "NA") for i, word in enumerate(words)], ending)
        data = load_task(make_dataset(tmp_path))
        assert data.train.texts == (words,) and data.label_names == ("EU", "NA")
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    for split in ("train", "validation"):
        write_split(tmp_path, split, [("a", "x"), ("b", ""), ("", "y"), ("d", "y")])
    with pytest.raises(UserError) as caught:
        load_task(make_dataset(tmp_path))
    for told in ("split 'train', column 'label': 1 labels outside the classes x, y, first row 1: None",
                 "split 'train', column 'text': 1 rows are not text, first row 2: None"):  # fmt: skip
        assert told in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    table = read(tmp_path, "t.csv", b"\xef\xbb\xbftext,label\na,0\n")
    assert list(table.columns) == ["text", "label"]


def test_json_as_lines_and_as_a_list(tmp_path):
    records = [{"text": "a", "label": 0}, {"label": 1, "text": "b"}, {"text": "c"}]
    expected = {"text": ["a", "b", "c"], "label": [0, 1, None]}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for name, content in (("t.json", json.dumps(records, indent=1)), ("t.json", lines), ("t.jsonl", lines)):
        assert read(tmp_path, name, content).columns == expected
    assert read(tmp_path, "t.jsonl", '{"text": "a\u2028b", "label": ' + "9" * 5000 + "}\n").columns["label"] == [
        float("inf")
    ]


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "\\ud800", "label": 0}\n{"text": "b", "label": 1}\n')
    with pytest.raises(UserError, match="1 rows are not text, first row 0"):
        load_task(make_dataset(tmp_path))


def test_classes_are_mapped_by_name_over_splits(tmp_path):
    train = datasets.Dataset.from_dict({"text": list("abcdef"), "label": ["bad", "fair", "good"] * 2})
    validation = datasets.Dataset.from_dict({"text": list("gh"), "label": ["good", "bad"]})
    for name, split in (("train", train), ("validation", validation)):
        split.class_encode_column("label").to_parquet(tmp_path / f"{name}.parquet")
    data = load_task(make_dataset(tmp_path))
    assert data.label_names == ("bad", "fair", "good") and data.evaluation.labels.tolist() == [2, 0]


def test_a_column_that_is_there_twice_in_parquet_is_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'text' is there 2 times"):
        read_table_file(tmp_path / "t.parquet")


def test_metric_and_names_of_ones_own_data(tmp_path):
    for split in ("train", "validation"):
        write_split(tmp_path, split, [("a", "1"), ("b", "2"), ("c", "1"), ("d", "2")])
    data = load_task(make_dataset(tmp_path, metric="f1", label_names=["bad", "good"]))
    assert (data.task_metric, data.label_names) == ("f1", ("bad", "good"))
    numbers = load_task(make_dataset(tmp_path, metric="spearman_correlation"))
    assert numbers.label_names == () and numbers.train.labels.tolist() == [1.0, 2.0, 1.0, 2.0]
    with pytest.raises(UserError, match=r"label_names.*numbers"):
        load_task(make_dataset(tmp_path, metric="spearman_correlation", label_names=["bad", "good"]))
