"""Reading run folders: the log as W&B's own inspector reads it, damaged logs, and the same bytes as from the server."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2
from wandb.util import get_core_path

from fwlora.experiment.errors import UserError
from fwlora.experiment.tracking.records import canonicalize
from fwlora.experiment.tracking.tracker import spell_non_finite
from fwlora.experiment.tracking.wandb.files import WRITER_FILE, note_writer, read_attempt
from fwlora.experiment.tracking.wandb.raw_run import RawRun
from fwlora.experiment.tracking.wandb.transaction_log import BLOCK_BYTES, FULL, HEADER, read_payloads
from tests.helpers.wandb_runs import (
    CONFIG,
    OFFLINE,
    TARGET,
    as_json,
    content,
    expected,
    load,
    rows,
    run_folders,
    start,
    sync,
    write,
)
from tests.helpers.wandb_server import WandbServer

NUMBERS = {
    "one": 1, "whole": 1.0, "hundred": 100.0, "negative_zero": -0.0, "tiny": 1e-05, "tinier": 1.5e-10, "least": 5e-324,
    "third": 1 / 3, "sum": 0.1 + 0.2, "most": 1.7976931348623157e308, "e20": 1e20, "e21": 1e21, "true": True,
    "false": False, "beyond_53_bits": 2**53 + 1, "beyond_60_bits": 2**60 + 1, "float_beyond_60_bits": 2.0**60 + 256,
    "last_of_64_bits": 2**63 - 1, "unsigned_64_bits": 2**64 - 1, "beyond_64_bits": 2**70 + 1, "negative": -(2**63),
    "nan": math.nan, "infinity": math.inf, "negative_infinity": -math.inf,
}  # fmt: skip
NESTED = {
    "list": [1, 2.0, [3.5, [None, True, "x"]], {"b": 1.0, "a": math.nan}, {}, []],
    "text": 'ü☃\u2028 \U0001f600 <&> "q" \\ / \t\n',
    "number_as_text": "1.0",
    "names": {"a.b": 1, "_hidden": 2, "Z": {"y": 1, "x": 2}},
    "none": None,
    "empty": {},
    "nearly_empty": {"inner": {"innermost": {}}},
    "no_items": [],
}


pytestmark = pytest.mark.usefixtures("client")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_awkward_values_are_the_same_bytes_from_files_and_server(
    server: WandbServer, tmp_path: Path, mode: str
) -> None:
    before = {"list": [2], "shape": {"a": 1}, "leaf": 1, "emptied": {"a": 1}, "only_before": {"b": 1}}
    after = {"list": [1], "shape": 2, "leaf": {"c": 1}, "emptied": {}}
    tracker = start(
        TARGET.model_copy(update={"mode": mode}), tmp_path, config={"run": NUMBERS | NESTED, "changed": before}
    )
    for step in (1, 2):
        tracker.log({"global_step": step, **NUMBERS})
    tracker.update_config({"changed": after, "resolved": NUMBERS | NESTED})
    tracker.set_summary({**NUMBERS, **NESTED, "dropped": 1})
    tracker.set_summary({"dropped": None})
    tracker.finish()
    if mode == "offline":
        sync(*run_folders(tmp_path))
    (files,), (api,) = load(tmp_path, "files"), load(tmp_path, "api")
    assert as_json(files) == as_json(api)

    numbers = {name: float(value) if abs(value) > 2**53 else value for name, value in NUMBERS.items()}
    numbers = spell_non_finite(numbers)
    kept = {"list": [1, 2, [3.5, [None, True, "x"]], {"a": "NaN", "b": 1}, {}, []]}
    kept |= {name: NESTED[name] for name in ("text", "number_as_text", "names", "no_items")}
    assert content(files)["config"] == {
        "changed": {"list": [1], "shape": 2, "leaf": {"c": 1}, "emptied": {"a": 1}, "only_before": {"b": 1}},
        "resolved": numbers | kept | {"none": None},
        "run": numbers | kept | {"none": None},
    }
    assert content(files)["history"] == [{"global_step": step, **numbers} for step in (1, 2)]
    assert content(files)["summary"] == {"global_step": 2, **numbers, **kept}
    assert isinstance(files.summary["whole"], int) and isinstance(files.config["run"]["beyond_60_bits"], float)


def inspect(file: Path) -> dict[str, Any]:
    """What W&B's own inspector finds in a log: history rows, entries last set, exit code."""
    # The program behind `wandb leet inspect`, without a second of Python around it.
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, file.parent]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = {"rows": [], "config": {}, "summary": {}, "state": "running", "records": 0}
    for line in output.splitlines():
        record = json.loads(line)
        found["records"] += 1
        if record["type"] == "history":
            found["rows"].append(record["history"]["item"])
        elif record["type"] == "summary":
            found["summary"] |= record["summary"]["update"]
        elif record["type"] in ("run", "config"):
            change = record["config"] if record["type"] == "config" else record["run"]["config"]
            found["config"] |= change["update"]
        elif record["type"] == "exit":
            found["state"] = "failed" if record["exit"].get("exit_code") else "finished"
    return found


def assert_read_as_inspected(file: Path, cut: Path, size: int) -> int:
    """Compares the two readers on the first bytes of a file; returns the number of rows found."""
    copy = cut / file.name
    copy.write_bytes(file.read_bytes()[:size])
    inspected, attempt = inspect(copy), read_attempt(cut, "a")
    nested = {name: value for name, value in attempt.summary.items() if name != "_wandb"}
    flat = {name: value for name, value in inspected["summary"].items() if not name.startswith("_wandb.")}
    assert len(list(read_payloads(copy))) == inspected["records"]
    found = (attempt.rows, attempt.config, nested), (inspected["rows"], inspected["config"], flat)
    assert spell_non_finite(canonicalize(found[0])) == spell_non_finite(canonicalize(found[1]))
    assert attempt.state == inspected["state"]
    return len(attempt.rows)


def test_whole_and_cut_logs_are_read_as_the_inspector_of_wandb_reads_them(tmp_path: Path) -> None:
    tracker = start(OFFLINE, tmp_path, config=CONFIG | {"run": NUMBERS | NESTED})
    write(tracker, range(1, 250))
    file = run_folders(tmp_path)[0] / "run-a.wandb"
    size = file.stat().st_size
    assert size > 2 * BLOCK_BYTES, "records do span blocks"
    cut = tmp_path / "cut"
    cut.mkdir()
    assert assert_read_as_inspected(file, cut, size) == 249
    edges = [0, 6, 7, 8, 13, 500, *(BLOCK_BYTES + shift for shift in (-8, -7, -1, 0, 1, 7, 8)), 2 * BLOCK_BYTES]
    sizes = sorted([*edges, *range(1000, size, 5000), size - 1])
    found = [assert_read_as_inspected(file, cut, size) for size in sizes]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 249 and len(set(found)) > 10


def test_every_record_before_a_cut_or_a_flipped_bit_is_read(tmp_path: Path) -> None:
    write(start(OFFLINE, tmp_path), range(1, 250))
    data = (run_folders(tmp_path)[0] / "run-a.wandb").read_bytes()
    copy = tmp_path / "copy.wandb"
    copy.write_bytes(data)
    whole = list(read_payloads(copy))
    counts = []
    for position in range(0, len(data), 211):
        flipped = bytearray(data)
        flipped[position] ^= 4
        for damaged in (data[:position], bytes(flipped), data[:position] + bytes(len(data) - position)):
            copy.write_bytes(damaged)
            read = list(read_payloads(copy))
            assert read == whole[: len(read)]
            counts.append(len(read))
        assert max(counts[-3:]) - min(counts[-3:]) <= 1, "no reader gave up before the damage"
    assert min(counts[-3:]) >= len(whole) - 10, "the last cut leaves all but a few short records"


def test_every_form_of_a_history_value_is_read(tmp_path: Path) -> None:
    record = wandb_internal_pb2.Record()
    forms = {"none": None, "boolean": False, "integer": 2**60 + 1, "number": 0.1, "text": "NaN", "json": "[1, 2.5]"}
    for kind, value in forms.items():
        record.history.item.add(nested_key=["typed", kind], **{kind: 0 if value is None else value})
    record.history.item.add(key="unset")
    record.history.item.add(key="both", number=1.0, value_json="2")
    (tmp_path / "run-a.wandb").write_bytes(HEADER + make_chunk(record.SerializeToString()))
    attempt = read_attempt(tmp_path, "a")
    assert attempt.rows == [
        {f"typed.{kind}": value for kind, value in forms.items()} | {"typed.json": [1, 2.5], "unset": None, "both": 2}
    ]


def make_chunk(payload: bytes) -> bytes:
    chunk = struct.pack("<HB", len(payload), FULL) + payload
    return struct.pack("<I", zlib.crc32(chunk[2:])) + chunk


def test_damage_under_a_right_checksum_ends_the_log(tmp_path: Path) -> None:
    row, broken = wandb_internal_pb2.Record(), wandb_internal_pb2.Record()
    row.history.item.add(key="global_step", value_json="1")
    broken.history.item.add(key="global_step", value_json="{")
    intact = make_chunk(row.SerializeToString())
    for damaged in (b"\xff\xff\xff", broken.SerializeToString()):
        (tmp_path / "run-a.wandb").write_bytes(HEADER + intact + make_chunk(damaged) + intact)
        assert read_attempt(tmp_path, "a").rows == [{"global_step": 1}]


def test_log_is_read_while_it_is_written(tmp_path: Path) -> None:
    tracker = start(OFFLINE, tmp_path)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for folder in run_folders(tmp_path):
                seen.append(len(read_attempt(folder, "a").rows))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for row in rows(range(1, 1001)):
        tracker.log(row)
    (running,) = load_when_there(tmp_path)
    tracker.finish()
    done.set()
    watcher.join()
    assert (
        running.state == "running"
        and content(running)["history"] == expected(rows(range(1, 1001)))[: len(running.history)]
    )
    assert seen == sorted(seen) and load(tmp_path, "files")[0].state == "finished"


def load_when_there(results: Path) -> list[Any]:
    """Rows reach the file about a second after they were logged."""
    for _ in range(50):
        time.sleep(0.1)
        if run_folders(results) and read_attempt(run_folders(results)[0], "a").rows:
            break
    return load(results, "files")


ELSEWHERE = {"place": "another machine", "pid": 1, "started": 0.0, "ended": False}
IDENTIFY = """
import json
from fwlora.experiment.process_identity import ProcessIdentity
print(json.dumps(ProcessIdentity.of_this_process().to_record()))
"""


def test_log_without_an_end_that_nobody_writes_any_more_is_of_a_crashed_run(tmp_path: Path) -> None:
    write(start(OFFLINE, tmp_path), [1, 2, 4])
    file = run_folders(tmp_path)[0] / "run-a.wandb"
    file.write_bytes(file.read_bytes()[:-30])
    assert load(tmp_path, "files")[0].state == "crashed", "its writer has ended, however young the damaged log is"
    for note in ("", "[" * 9000, "7", "{}", *(json.dumps(each) for each in (ELSEWHERE, {"pid": 1}))):
        (file.parent / WRITER_FILE).write_text(note)
        os.utime(file)
        assert load(tmp_path, "files")[0].state == "running", f"{note[:40]}: the log's age decides"
        long_ago = time.time() - 3600
        os.utime(file, (long_ago, long_ago))
        assert load(tmp_path, "files")[0].state == "crashed"
    note_writer(file.parent)
    assert load(tmp_path, "files")[0].state == "running", "its writer lives, however old the log is"
    child = subprocess.run([sys.executable, "-c", IDENTIFY], capture_output=True, text=True, check=True)
    (file.parent / WRITER_FILE).write_text(child.stdout)
    os.utime(file)
    assert load(tmp_path, "files")[0].state == "crashed", "its writer is gone, however young the log is"


def test_clock_orders_attempts_but_not_the_rows_of_one() -> None:
    def read(*rows: tuple[int, float, str]) -> list[tuple[int, str]]:
        named = [{"global_step": step, "_timestamp": time_s, "train_loss": loss} for step, time_s, loss in rows]
        return [(row["global_step"], row["train_loss"]) for row in RawRun("", rows=named).to_record("a").history]

    first = [(1, 10.0, "first"), (2, 11.0, "first"), (3, 12.0, "first")]
    second = [(3, 20.0, "second"), (4, 21.0, "second")]
    assert read(*second, *first) == read(*first, *second) == [(1, "first"), (2, "first"), (3, "second"), (4, "second")]
    assert read(*first, *second, *first, *second) == read(*first, *second)
    set_back = [(1, 10.0, "x"), (2, 5.0, "x"), (3, 6.0, "x")]
    assert read(*set_back) == [(1, "x"), (2, "x"), (3, "x")]


def test_latest_complete_folder_counts(tmp_path: Path) -> None:
    for scale, exit_code in [(1.0, 0), (2.0, 0), (3.0, 1)]:
        write(start(OFFLINE, tmp_path, "a"), [1, 2, 4], scale, exit_code)
    for scale in (1.0, 2.0):
        write(start(OFFLINE, tmp_path, "b"), [1, 2], scale, exit_code=1)
    complete, failed = load(tmp_path, "files", "a", "b")
    assert complete.finished and complete.history == rows([1, 2, 4], scale=2.0)
    assert complete.config["resolved"]["scale"] == 2.0
    assert not failed.finished and failed.history == rows([1, 2], scale=2.0)


def test_file_that_a_crash_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    for run_id in ("a", "b"):
        write(start(OFFLINE, tmp_path, run_id), [1, 2, 4, 5, 6, 7, 8])
    (cut,), (destroyed,) = [list(tmp_path.glob(f"{run_id}/wandb/offline-run-*/*.wandb")) for run_id in ("a", "b")]
    cut.write_bytes(cut.read_bytes()[:-1200])
    destroyed.write_bytes(b"not a transaction log")
    (record,) = load(tmp_path, "files", "a")
    assert not record.finished and record.config["run"] == CONFIG["run"]
    assert 0 < len(record.history) < 7 and record.history == rows([1, 2, 4, 5, 6, 7, 8])[: len(record.history)]
    with pytest.raises(UserError, match="`b`: no readable W&B file in"):
        load(tmp_path, "files", "b")


def test_values_that_no_client_writes_are_missing_or_infinite(tmp_path: Path) -> None:
    record = wandb_internal_pb2.Record()
    deep = "[" * 15_000 + "]" * 15_000
    for name, text in {"large": "9" * 400, "low": "-" + "9" * 400, "cut": "[1", "right": "2"}.items():
        record.summary.update.add(key=name, value_json=text)
    row = wandb_internal_pb2.Record()
    row.history.item.add(key="global_step", value_json=deep)
    folder = tmp_path / "a" / "wandb" / "offline-run-20260101_000000-a"
    folder.mkdir(parents=True)
    config = wandb_internal_pb2.Record()
    config.config.update.add(key="run", value_json="{}")
    log = HEADER + make_chunk(config.SerializeToString()) + make_chunk(record.SerializeToString())
    (folder / "run-a.wandb").write_bytes(log)
    summary = {"large": math.inf, "low": -math.inf, "right": 2}
    attempt = read_attempt(folder, "a")
    assert attempt.to_record("a").summary == summary
    (folder / "run-a.wandb").write_bytes(HEADER + make_chunk(row.SerializeToString()))
    assert read_attempt(folder, "a").rows == []
