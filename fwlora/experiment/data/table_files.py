"""Tables in files of one's own: CSV, TSV, JSON, JSON lines and Parquet, read as they are and never guessed at.

Fields of CSV and TSV are text, and nothing but an empty field is missing. Files are read anew each time, so that what
they hold counts and not when they were written.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwlora.experiment.errors import UserError

Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A split with named columns.

    Attributes:
        columns: values by column name, all of one length; None for a missing value.
        class_names: by column, the names that the values 0, 1, ... stand for, where the source states them.
    """

    columns: Mapping[str, Sequence[object]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_table_file(path: Path) -> Table:
    """Read one file, whose ending names its form.

    Raises:
        UserError: what the file holds is no table, with the row or the column.
    """
    try:
        return READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no UTF-8; save it as UTF-8"
    except OSError as error:
        reason = f"it cannot be read ({error.strerror or error})"
    except MalformedTableError as error:
        reason = str(error)
    raise UserError(f"{path}: {reason}")


class MalformedTableError(ValueError):
    """What a file holds is no table."""


def _read_csv(path: Path) -> Table:
    return _from_rows(*_parse_csv(_read_text(path), ","))


def _read_tsv(path: Path) -> Table:
    """Read fields between tabs: quoted as CSV's are where the file shows it, else with their quotation marks as text.

    GLUE's own files hold unbalanced quotation marks; a CSV writer doubles those inside a quoted field.
    """
    text = _read_text(path)
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    plain = [line.split("\t") for _, line in lines if line]
    if '"' in text:
        try:
            rows, numbers = _parse_csv(text, "\t")
        except MalformedTableError:
            rows, numbers = [], []
        if _shows_quoting(plain, rows):
            return _from_rows(rows, numbers)
    return _from_rows(plain, [number for number, line in lines if line])


def _shows_quoting(plain: Rows, parsed: Rows) -> bool:
    """Return whether quotation marks enclose fields, rather than being text.

    They do where rows have the header's length only so, where they enclose all names of columns, or where an enclosed
    field holds doubled ones.
    """

    def is_even(rows: Rows) -> bool:
        return bool(rows) and all(len(row) == len(rows[0]) for row in rows)

    if not is_even(parsed):
        return False
    if not is_even(plain) or all(name.startswith('"') for name in plain[0]):
        return True
    if len(parsed) != len(plain):
        return False
    pairs = (pair for rows in zip(plain, parsed, strict=True) for pair in zip(*rows, strict=False))
    return any(before.startswith('"') and '"' in after for before, after in pairs)


def _read_jsonl(path: Path) -> Table:
    return _from_records(
        [
            (f"line {number}", _parse_json(line, f"line {number}"))
            for number, line in enumerate(_read_text(path).split("\n"), 1)
            if line.strip()
        ]
    )


def _read_json(path: Path) -> Table:
    """Read a list of objects, or an object per line."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = _parse_json(text, "the file")
        return _from_records([(f"entry {number}", record) for number, record in enumerate(records)])
    return _read_jsonl(path)


def _read_parquet(path: Path) -> Table:
    import datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        features = datasets.Features.from_arrow_schema(table.schema)
    except Exception as error:  # pyarrow raises its own types, of several bases
        raise MalformedTableError(f"it is no Parquet file ({_first_line(error)})") from None
    repeated = [name for name, times in Counter(table.column_names).items() if times > 1]
    if repeated:
        raise MalformedTableError(f"column {repeated[0]!r} is there {table.column_names.count(repeated[0])} times")
    names = {name: tuple(kind.names) for name, kind in features.items() if getattr(kind, "names", None)}
    return Table({name: table[name].to_pylist() for name in table.column_names}, names)


READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": _read_csv, ".tsv": _read_tsv, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet,
}  # fmt: skip


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _parse_csv(text: str, separator: str) -> tuple[Rows, list[int]]:
    """Return the rows of a text and the line that each ends at."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: Rows = []
    numbers = []
    try:
        for row in reader:
            if row:
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise MalformedTableError(f"line {reader.line_num}: {error}; enclose fields as CSV does") from None
    return rows, numbers


def _from_rows(rows: Rows, numbers: Sequence[int]) -> Table:
    """Make a table whose first row names the columns; an empty field is a missing value.

    Args:
        rows: of fields.
        numbers: the line of the file that each ends at.
    """
    if not rows:
        raise MalformedTableError("it is empty; its first line names the columns")
    header = rows[0]
    repeated = [name for name, times in Counter(header).items() if times > 1]
    if repeated:
        raise MalformedTableError(f"its first line names column {repeated[0]!r} {header.count(repeated[0])} times")
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(header):
            raise MalformedTableError(
                f"line {number} has {len(row)} fields, and the first line names {len(header)} columns: {row[:3]}"
            )
    return Table({name: [row[place] or None for row in rows[1:]] for place, name in enumerate(header)})


def _from_records(records: Sequence[tuple[str, object]]) -> Table:
    """Make a table of JSON objects; a key that one lacks is a missing value."""
    names: dict[str, None] = {}
    for place, record in records:
        if not isinstance(record, dict):
            raise MalformedTableError(f"{place} is no object with a key per column, but {str(record)[:60]!r}")
        names.update(dict.fromkeys(record))
    if not names:
        raise MalformedTableError("it holds no objects with a key per column")
    rows: list[Mapping[str, object]] = [record for _, record in records if isinstance(record, dict)]
    return Table({name: [row.get(name) for row in rows] for name in names})


def _parse_json(text: str, place: str) -> Any:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if repeated:
            raise MalformedTableError(f"{place}: an object has the key {repeated[0]!r} more than once")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=build, parse_int=_parse_integer)
    except RecursionError:
        raise MalformedTableError(f"{place} is nested too deep") from None
    except json.JSONDecodeError as error:
        raise MalformedTableError(f"{place} is no JSON ({error.msg} at character {error.pos})") from None


def _parse_integer(digits: str) -> int | float:
    """Read an integer; one of thousands of digits, which Python refuses to read, is no number of any use."""
    return int(digits) if len(digits) < sys.int_info.str_digits_check_threshold else math.inf


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
