"""Checkpoints on a disk: whole or not there, damage found, the last two kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fwlora.experiment import files
from fwlora.experiment.files import replace_folder
from fwlora.experiment.resume.store import CheckpointStore
from tests.helpers.paths import REPOSITORY


def write(store: CheckpointStore, step: int, content: str = "x") -> Path:
    partial = store.open_partial()
    (partial / "state.json").write_text(f"{content} {step}")
    return store.commit(partial, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoint")
    assert store.is_empty and list(store.read_newest()) == []
    for step in (5, 5, 7):
        write(store, step)
    assert names(store.folder) == ["000002-step-5", "000003-step-7"]
    newest, before = store.read_newest()
    assert (newest.step, before.step) == (7, 5)
    assert (newest.folder / "state.json").read_text() == "x 7"
    (store.folder / "trials.txt").write_text("")
    (store.folder / "adapter_model.safetensors").write_text("saved by an older version")
    (store.folder / ".killed.partial").mkdir()
    store.clear()
    assert store.is_empty and names(store.folder) == ["adapter_model.safetensors"]
    (store.folder / "adapter_model.safetensors").unlink()
    store.clear()
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "note", "note cut"])
def test_of_a_damaged_one_the_one_before_is_used_and_that_is_said(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    newest = write(store, 2)
    file = newest / ("checkpoint.json" if damage.startswith("note") else "state.json")
    if damage == "removed":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-3] if damage.endswith("cut") else content.replace(b"2", b"3"))
    found = next(store.read_newest())
    assert found.step == 1
    assert caplog.messages[0].startswith(f"warning: checkpoint {newest} is damaged (")
    for path in (tmp_path / "000001-step-1").iterdir():
        path.write_bytes(b"")
    assert list(store.read_newest()) == [] and not store.is_empty


def test_a_disk_that_is_full_leaves_what_there_is(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    write(store, 1)

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr("fwlora.experiment.resume.store.sync_tree", fail)
    with pytest.raises(OSError, match="No space"):
        write(store, 2)
    assert names(tmp_path) == ["000001-step-1"] and next(store.read_newest()).step == 1


def test_what_a_killed_process_left_is_deleted_with_the_next_one(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.open_partial() / "state.json").write_text("half")
    (tmp_path / ".other.partial").write_text("half")
    assert store.is_empty and len(names(tmp_path)) == 2
    write(store, 3)
    assert names(tmp_path) == ["000001-step-3"]


KILLED = """
import sys
from pathlib import Path
from fwlora.experiment.files import replace_folder
folder = Path(sys.argv[1])
number = 0
while True:
    number += 1
    def fill(partial):
        for name in ("a", "b", "c"):
            (partial / name).write_text(str(number) * 1000)
    replace_folder(folder, fill)
    if number == 1:
        print("first", flush=True)
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced_is_never_missing_half_or_mixed(tmp_path, exchange):
    """SIGKILL at moments of its replacement; without the system's exchange it may be missing for a moment, not half."""
    code = KILLED if exchange else "import fwlora.experiment.files as f; f._exchange = lambda a, b: False\n" + KILLED
    missing = 0
    for attempt in range(12):
        folder = tmp_path / f"{attempt}" / "adapter"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        ) as killed:
            assert killed.stdout is not None and killed.stdout.readline() == "first\n"
            time.sleep(0.003 * attempt)
            killed.send_signal(signal.SIGKILL)
        if not folder.exists():
            missing += 1
            continue
        contents = [(folder / name).read_text() for name in ("a", "b", "c")]
        assert len(set(contents)) == 1 and contents[0]
    assert missing == 0 if exchange else missing <= 3


def test_replacing_without_the_systems_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for content in ("one", "two"):
        replace_folder(tmp_path / "adapter", lambda partial, content=content: (partial / "a").write_text(content))
    assert names(tmp_path) == ["adapter"] and (tmp_path / "adapter" / "a").read_text() == "two"
