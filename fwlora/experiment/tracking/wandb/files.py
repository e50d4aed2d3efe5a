"""Read runs from the folders that W&B's client makes on this machine."""

from __future__ import annotations

import difflib
import json
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fwlora.experiment.files import write_files
from fwlora.experiment.json_types import JsonObject
from fwlora.experiment.process_identity import ProcessIdentity
from fwlora.experiment.tracking.records import RunRecord
from fwlora.experiment.tracking.wandb.raw_run import RawRun, RunUnavailableError
from fwlora.experiment.tracking.wandb.transaction_log import read_payloads

RECORDS_AFTER_END = 100  # there are a few at most
WRITER_FILE = "writer.json"
LIVE_S = 60.0  # W&B's client writes to the log of a run that is under way more often than this

_Items = dict[tuple[str, ...], Any]  # protocol buffer items by path into nested mappings


def find_run_folders(directory: Path, run_id: str) -> list[Path]:
    """List the folders that W&B made for a run, oldest first; a second one of the same second has a suffix."""
    pattern = re.compile(rf"(?:offline-)?run-(\d{{8}}_\d{{6}})-{re.escape(run_id)}(?:-(\d+))?")
    dated = []
    for folder in directory.glob("wandb/*"):
        if (name := pattern.fullmatch(folder.name)) and (file := folder / f"run-{run_id}.wandb").is_file():
            dated.append((name[1], int(name[2] or 0), file.stat().st_mtime, folder))
    return [folder for *_, folder in sorted(dated)]


def read_files(run_id: str, results_dir: Path, project: str) -> RunRecord:
    """Read the latest attempt that ended with exit code 0, otherwise the latest, on top of those that it continues.

    Rows of these count unless it repeated them: an attempt that resumed from a checkpoint does not have the run's first
    steps. So do config entries, while each attempt has its own summary. The server does the same. Attempts in a mode
    that is recorded apart, such as ``pilot``, count in their own project alone.

    Args:
        run_id: of the run.
        results_dir: holds ``<run_id>/wandb``.
        project: that is evaluated.

    Raises:
        RunUnavailableError: there is no readable file.
    """
    folders = find_run_folders(results_dir / run_id, run_id)
    readable = read_attempts(folders, run_id)
    if not readable:
        raise RunUnavailableError(_explain_missing(run_id, results_dir, bool(folders)))
    own = [attempt for attempt in readable if attempt.project == project]
    attempts = own or [attempt for attempt in readable if not attempt.is_apart]
    if not attempts:
        others = " and ".join(sorted({attempt.project for attempt in readable}))
        raise RunUnavailableError(f"W&B's files in {results_dir / run_id / 'wandb'} are of the project {others}")
    complete = [index for index, attempt in enumerate(attempts) if attempt.state == "finished"]
    chosen = complete[-1] if complete else len(attempts) - 1
    number, chain = attempts[chosen].attempt
    earlier = [attempt for attempt in attempts[:chosen] if (attempt.attempt[0] in chain if number else True)]
    return join_attempts([*earlier, attempts[chosen]]).to_record(run_id)


def read_attempts(folders: Sequence[Path], run_id: str) -> list[RawRun]:
    """Read what is readable of a run's folders, in the order of the attempts' numbers; of none by the folders' names.

    Raises:
        RunUnavailableError: a file cannot be read.
    """
    try:
        read = [read_attempt(folder, run_id) for folder in folders]
    except OSError as error:
        raise RunUnavailableError(f"{error.filename} cannot be read ({error.strerror})") from error
    return sorted((each for each in read if each.config or each.rows), key=lambda each: each.attempt[0])


def join_attempts(attempts: Sequence[RawRun]) -> RawRun:
    """Put attempts that continue one another together; state, summary and place are the last one's."""
    run = replace(attempts[-1], config={}, rows=[])
    for attempt in attempts:
        run.config |= attempt.config
        run.rows += attempt.rows
    return run


def has_end(file: Path) -> bool:
    """Return whether a log holds the run's end, by a fast scan of the file."""
    from wandb.proto import wandb_internal_pb2

    parse: Any = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]
    last = deque(read_payloads(file), maxlen=RECORDS_AFTER_END)
    return any(parse(payload).WhichOneof("record_type") == "exit" for payload in last)


def note_writer(folder: Path, ended: bool = False) -> None:
    """Note in a run folder that this process writes its log, or has written the last of it.

    Raises:
        OSError: the note cannot be written.
    """
    note = {**ProcessIdentity.of_this_process().to_record(), "ended": ended}
    write_files({folder / WRITER_FILE: json.dumps(note).encode()})


def is_written(folder: Path, file: Path) -> bool:
    """Return whether a process still writes to the log of a run folder.

    Its writer's note decides. Where there is none, or where it names a process of another machine, the log's age does.
    """
    with suppress(OSError, ValueError, RecursionError):
        note = json.loads((folder / WRITER_FILE).read_bytes())
        writer = ProcessIdentity.from_record(note)
        lives = writer.lives() if writer else None
        if lives is not None:
            return lives and not note.get("ended")
    return time.time() - file.stat().st_mtime < LIVE_S


def read_attempt(folder: Path, run_id: str) -> RawRun:
    """Read the log of a run folder, as far as it is intact."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    parse: Any = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]
    file = folder / f"run-{run_id}.wandb"
    attempt = RawRun(str(folder), state="running" if is_written(folder, file) else "crashed")
    summary: _Items = {}
    with suppress(DecodeError, ValueError, RecursionError):  # damage that the checksum missed ends the log as well
        for payload in read_payloads(file):
            record = parse(payload)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                attempt.rows.append(_read_row(record.history.item))
            elif kind == "summary":
                _note_summary(summary, record.summary)
            elif kind == "config":
                _change_config(attempt.config, record.config)
            elif kind == "run":
                _change_config(attempt.config, record.run.config)
            elif kind == "exit":
                attempt.state = "failed" if record.exit.exit_code else "finished"
            if kind == "run" and not folder.name.startswith("offline-"):
                attempt.place = f"{record.run.entity}/{record.run.project}/{run_id}"
    attempt.summary = _decode_entries(summary)
    return attempt


def _read_row(items: Sequence[Any]) -> JsonObject:
    names = [sys.intern(item.key or ".".join(item.nested_key)) for item in items]
    texts = [item.value_json for item in items]
    # One call of the decoder per row is faster than one per value.
    values = json.loads(f"[{','.join(texts)}]") if all(texts) else map(_decode_typed, items)
    return dict(zip(names, values, strict=True))


def _decode_typed(item: Any) -> Any:
    """Decode a history value in any of the forms that W&B's client writes."""
    kind = "value_json" if item.value_json else item.WhichOneof("value")
    if kind in ("value_json", "json"):
        return json.loads(getattr(item, kind))
    return None if kind in (None, "none") else getattr(item, kind)


def _note_summary(entries: _Items, change: Any) -> None:
    """Keep items undecoded; only the last ones are decoded, as every row sets all values again."""
    for item in change.update:
        entries[(item.key,) if item.key else tuple(item.nested_key)] = item
    for item in change.remove:
        entries.pop((item.key,) if item.key else tuple(item.nested_key), None)


def _change_config(config: JsonObject, change: Any) -> None:
    """Set entries as W&B does: a mapping is merged into the existing one."""
    for item in change.update:
        _join(config, _as_mapping(item))
    for item in change.remove:
        config.pop(item.key, None)


def _join(place: JsonObject, entries: JsonObject) -> None:
    for name, value in entries.items():
        if isinstance(value, dict) and isinstance(place.get(name), dict):
            _join(place[name], value)
        else:
            place[name] = value


def _decode_entries(entries: _Items) -> JsonObject:
    decoded: JsonObject = {}
    for item in entries.values():
        with suppress(ValueError, RecursionError):  # what is no JSON is missing
            _join(decoded, _as_mapping(item))
    return decoded


def _as_mapping(item: Any) -> JsonObject:
    value = json.loads(item.value_json)
    for name in reversed((item.key,) if item.key else tuple(item.nested_key)):
        value = {name: value}
    return value


def _explain_missing(run_id: str, results_dir: Path, unreadable: bool) -> str:
    folder = results_dir / run_id / "wandb"
    if unreadable:
        return f"no readable W&B file in {folder}"
    known = [path.parent.name for path in results_dir.glob("*/wandb")]
    close = ", ".join(difflib.get_close_matches(run_id, known, n=3))
    return f"no W&B files in {folder}" + (f" (there are: {close})" if close else "")
