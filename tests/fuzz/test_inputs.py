"""Malformed input at every reader's boundary: it is read, or refused in one message, within seconds.

500 inputs in the fast tier, 10,000 in the slow one; they are drawn anew from their seeds, the same on every machine.
"""

from __future__ import annotations

import json
import random
import shutil
import string
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from fwlora.experiment.data.batching import TokenizedSplit
from fwlora.experiment.data.table_files import READERS, read_table_file
from fwlora.experiment.data.token_cache import cached_tokens
from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.claims.claim import load_claims
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.evaluation.request import parse_request
from fwlora.experiment.settings.hydra_arguments import compose_settings
from fwlora.experiment.study.spec import load_study
from fwlora.experiment.tracking.records import RunRecord
from fwlora.experiment.tracking.wandb.reading import WandbSource
from fwlora.experiment.tracking.wandb.transaction_log import (
    BLOCK_BYTES,
    CHUNK_HEAD,
    FIRST,
    FULL,
    HEADER,
    LAST,
    MIDDLE,
)
from tests.helpers import evaluation_records as records
from tests.helpers.paths import CONFIG_DIR
from tests.helpers.wandb_server import StoredRun, WandbServer

FAST, SLOW = 500, 10_000
LONGEST_S = 5.0
RUN = "comparative-1-minilm-L6--acceptability"
# What readers stumble over: encodings, nesting, numbers out of range, markup of other languages, control characters.
FRAGMENTS = [
    "", " ", "\0", "\ud800", "\ufeff", "\u2028", "é", "好", "🙂", "'", '"', "''", "\\", "/", "..", "~", "$x$", "${run}",
    "${oc.env:HOME}", "{", "}", "[", "]", "[" * 900, "{a: " * 300, ":", ": ", ",", "#", "-", "- ", "&x", "*x",
    "!!python/object:os.system", "<script>", "=1+1", "null", "true", "yes", "NaN", ".inf", "-0", "1e400", "9" * 400,
    "0x1f", "1_000", "1e-400", "\t", "\n", "\r\n", "run_id", "method", "training", "learning_rate", "search_space",
    "label", "text", "\x1b[31m", "a" * 3_000,
]  # fmt: skip


def scramble(text: str, rng: random.Random) -> str:
    """Insert, delete, repeat or exchange pieces of a text, a few times."""
    for _ in range(rng.randint(1, 4)):
        place, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:place] + rng.choice(FRAGMENTS) + text[place:]
        elif kind == 1:
            text = text[:place] + text[min(end, place + 40) :]
        elif kind == 2:
            text = text[:end] + text[place:end][:200] + text[end:]
        elif kind == 3:
            text = text[:place] + "".join(rng.choices(string.printable, k=rng.randint(1, 6))) + text[place:]
        else:
            text = rng.choice(FRAGMENTS) + text if rng.random() < 0.5 else text + rng.choice(FRAGMENTS)
    return text


def to_bytes(text: str, rng: random.Random) -> bytes:
    """Encode a text, at times with a byte that is no UTF-8."""
    raw = text.encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.2:
        place = rng.randint(0, len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place:]
    return raw


def with_file(folder: str, name: str, read: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    """Scramble one file of a copy of the configuration."""

    def run(tmp_path: Path, rng: random.Random) -> None:
        config = tmp_path / "config"
        if not config.exists():
            shutil.copytree(CONFIG_DIR, config)
        path = config / folder / f"{name}.yaml"
        original = (CONFIG_DIR / folder / f"{name}.yaml").read_text()
        path.write_bytes(to_bytes(scramble(original, rng), rng))
        try:
            read(config)
        finally:
            path.write_text(original)

    return run


def overrides(tmp_path: Path, rng: random.Random) -> None:
    keys = [
        "run.training.learning_rate", "run.training.epochs", "run.model.name", "results_dir", "run.dataset.name",
        "wandb.mode",
    ]  # fmt: skip
    given = [f"{rng.choice(keys)}={scramble(rng.choice(['1', '0.1', 'a', '[1,2]', '{a: 1}']), rng)}" for _ in range(2)]
    if rng.random() < 0.3:
        given.append(scramble("run.training.seed=1", rng))
    compose_settings([f"run={RUN if rng.random() < 0.9 else scramble(RUN, rng)}", "mode=trial", *given], CONFIG_DIR, {})


def run_ids(tmp_path: Path, rng: random.Random) -> None:
    text = scramble(json.dumps(["a", "b-s1", "run"]), rng)
    parse_request([f"results_dir={scramble('r', rng)}", f"run_ids={text}"], {}, CONFIG_DIR / "config.yaml")


def data_files(tmp_path: Path, rng: random.Random) -> None:
    ending = rng.choice(list(READERS))
    rows = [{"text": f"sentence {i}", "label": i % 2} for i in range(5)]
    contents = {
        ".csv": "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows),
        ".tsv": "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows), ".json": json.dumps(rows),
        ".parquet": "PAR1" + "x" * 50 + "PAR1",
    }  # fmt: skip
    path = tmp_path / f"train{ending}"
    path.write_bytes(to_bytes(scramble(contents[ending], rng), rng))
    table = read_table_file(path)
    assert len({len(values) for values in table.columns.values()}) <= 1


def scramble_value(value: object, rng: random.Random) -> object:
    choices: list[object] = [
        None, True, -1, 0, 10**400, float("nan"), float("inf"), "", "NaN", "\ud800", [], {}, [None], {"a": {}},
        "9" * 5_000,
    ]  # fmt: skip
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: scramble_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return [*value[:place], scramble_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.5:
        return scramble(value, rng)
    return rng.choice(choices)


def recorded_runs(tmp_path: Path, rng: random.Random) -> None:
    record = records.make_record("a", rng.choice(["baseline_lora", "proposed_fw_lora"]))
    part = rng.choice(["config", "summary", "history"])
    value = getattr(record, part)
    changed = scramble_value(json.loads(json.dumps(value)), rng)
    if isinstance(changed, type(value)):
        read_runs([type(record)(**{**vars(record), part: changed})])


def token_cache(tmp_path: Path, rng: random.Random) -> None:
    labels = np.array([0, 1, 0])
    split = TokenizedSplit(np.arange(9, dtype=np.int32), None, np.array([0, 2, 5, 9]), labels, cut=1)
    folder = tmp_path / "tokens"
    cached_tokens(folder, ["a"], labels, lambda: split)
    (place,) = folder.iterdir()
    path = rng.choice(sorted(place.iterdir()))
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw)) : rng.randrange(len(raw))] = bytes(rng.choices(range(256), k=rng.randint(0, 3)))
    path.write_bytes(bytes(raw))
    got = cached_tokens(folder, ["a"], labels, lambda: split)
    for name in ("tokens", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(got, name), getattr(split, name))
    assert got.cut == 1


def entries_of(values: dict) -> list[tuple[str, str]]:
    return [(name, json.dumps(value)) for name, value in values.items()]


def make_log(record: RunRecord, rng: random.Random) -> bytes:
    """Write a run as W&B's client does, one value of one record exchanged under a right checksum."""
    messages = []
    for kind in ("run", "summary", *["history"] * len(record.history), "exit"):
        messages.append((kind, wandb_internal_pb2.Record()))
    rows = iter(record.history)
    broken = rng.randrange(len(messages))
    for place, (kind, message) in enumerate(messages):
        given = {"run": record.config, "summary": record.summary, "exit": {}}
        entries = entries_of(given[kind] if kind in given else dict(next(rows)))
        if place == broken and entries:
            one = rng.randrange(len(entries))
            name, text = entries[one]
            changed = scramble(text, rng) if rng.random() < 0.2 else json.dumps(scramble_value(json.loads(text), rng))
            entries[one] = (scramble(name, rng) if rng.random() < 0.2 else name, changed)
        target = {"run": message.run.config.update, "summary": message.summary.update, "history": message.history.item}
        for name, text in entries:
            item = target[kind].add()
            item.key, item.value_json = (each.encode(errors="replace").decode() for each in (name, text))
        if kind == "exit":
            message.exit.exit_code = rng.choice([0, 0, 0, 1, 2**31 - 1])
    log = bytearray(HEADER)
    for _, message in messages:
        log += make_chunks(message.SerializeToString(), len(log))
    return bytes(log)


def make_chunks(payload: bytes, position: int) -> bytes:
    """Frame a record as LevelDB's log does, split where a block ends."""
    framed, begun = b"", False
    while True:
        left = BLOCK_BYTES - (position + len(framed)) % BLOCK_BYTES
        if left < CHUNK_HEAD.size:
            framed += bytes(left)
            continue
        part, payload = payload[: left - CHUNK_HEAD.size], payload[left - CHUNK_HEAD.size :]
        kind = (LAST if begun else FULL) if not payload else (MIDDLE if begun else FIRST)
        typed = bytes([kind]) + part
        framed += struct.pack("<IH", zlib.crc32(typed), len(part)) + typed
        begun = True
        if not payload:
            return framed


def wandb_logs(tmp_path: Path, rng: random.Random) -> None:
    folder = tmp_path / "a" / "wandb" / "offline-run-20260101_000000-a"
    folder.mkdir(parents=True, exist_ok=True)
    raw = bytearray(make_log(records.make_record("a"), rng))
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(raw))
            raw[place : place + rng.randint(0, 9)] = bytes(rng.choices(range(256), k=rng.randint(0, 9)))
    (folder / "run-a.wandb").write_bytes(bytes(raw))
    read_runs(WandbSource(tmp_path, "files", "team", "project").load(["a"]))


def wandb_payloads(server: WandbServer, rng: random.Random) -> None:
    record = json.loads(json.dumps(vars(records.make_record("a", rng.choice(["baseline_lora", "proposed_fw_lora"])))))
    stored = StoredRun("team", "project", "a", "a", state=rng.choice(["finished"] * 5 + ["running", "", "killed"]))
    parts = {
        "config": {name: {"value": value} for name, value in record["config"].items()},
        "summary": record["summary"],
        "history": [{**row, "_step": step} for step, row in enumerate(record["history"])],
    }
    part = rng.choice(list(parts))
    if rng.random() < 0.7:
        parts[part] = scramble_value(parts[part], rng)
    texts = {name: json.dumps(value) for name, value in parts.items() if name != "history"}
    rows = parts["history"] if isinstance(parts["history"], list) else [parts["history"]]
    lines = [json.dumps(row) for row in rows]
    if rng.random() < 0.3:
        place = rng.randrange(len(lines)) if lines else 0
        lines[place : place + 1] = [scramble(line, rng) for line in lines[place : place + 1]]
        name = rng.choice(list(texts))
        texts[name] = scramble(texts[name], rng)
    stored.config, stored.summary = texts["config"], texts["summary"]
    stored.lines, stored.steps = dict(enumerate(lines)), {number: number for number in range(len(lines))}
    server.runs["team", "project", "a"] = stored
    read_runs(WandbSource(Path("nowhere"), "api", "team", "project").load(["a"]))


BOUNDARIES: dict[str, Callable[[Path, random.Random], None]] = {
    "run files": with_file("runs", RUN, lambda config: compose_settings([f"run={RUN}", "mode=full"], config, {})),
    "claims": with_file("claims", "above-lora", lambda config: load_claims(config / "claims")),
    "studies": with_file("study", "quickstart", lambda config: load_study("quickstart", config)),
    "overrides": overrides,
    "run_ids": run_ids,
    "data files": data_files,
    "records": recorded_runs,
    "token cache": token_cache,
    "W&B logs": wandb_logs,
}
PAYLOADS = "W&B payloads"
SHARE = 1 / (len(BOUNDARIES) + 1)


def fuzz(boundary: str, attempt: Callable[[random.Random], None], inputs: int) -> None:
    """Try so many inputs; name the seed of one that is neither read nor refused in one message."""
    for seed in range(inputs):
        rng = random.Random(f"{boundary} {seed}")
        started = time.perf_counter()
        try:
            attempt(rng)
        except UserError as error:
            if not str(error).strip():
                pytest.fail(f"{boundary}, input {seed}: an empty message")
        except Exception as error:
            raise AssertionError(f"{boundary}, input {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        took = time.perf_counter() - started
        assert took < LONGEST_S, f"{boundary}, input {seed}: {took:.1f} s"


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_malformed_input_is_read_or_refused(boundary, tmp_path):
    fuzz(boundary, partial(BOUNDARIES[boundary], tmp_path), int(FAST * SHARE) + 1)


def test_malformed_answers_of_a_server_are_read_or_refused(server):
    fuzz(PAYLOADS, partial(wandb_payloads, server), int(FAST * SHARE) + 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_much_malformed_input_is_read_or_refused(boundary, tmp_path):
    fuzz(boundary, partial(BOUNDARIES[boundary], tmp_path), int(SLOW * SHARE) + 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_malformed_answers_of_a_server_are_read_or_refused(server):
    fuzz(PAYLOADS, partial(wandb_payloads, server), int(SLOW * SHARE) + 1)
