"""One holder per run: threads, processes, children that take over, holders that die."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fwlora.experiment.errors import EXIT_HELD
from fwlora.experiment.resume import lock
from fwlora.experiment.resume.lock import HeldRunError, Holder, RunLock
from tests.helpers.paths import REPOSITORY

HOLDS = """
import sys, time
from pathlib import Path
from fwlora.experiment.resume.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "a", int(sys.argv[2]) if len(sys.argv) > 2 else None)
print("held", flush=True)
sys.stdin.read()
"""


def hold(file: Path, *more: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDS, str(file), *more]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_run_until_that_one_dies(tmp_path):
    file = tmp_path / "attempts" / "lock"
    with hold(file) as holder:
        with pytest.raises(HeldRunError, match=rf"run a is being made by process {holder.pid} on .*, since 20") as told:
            RunLock(file, "a")
        assert told.value.exit_code == EXIT_HELD
        holder.kill()
    with RunLock(file, "a"):
        found = Holder.read(file)
        assert found is not None and found.process.pid == os.getpid()
        with pytest.raises(HeldRunError):
            RunLock(file, "a")
    RunLock(file, "a").release()


def test_a_child_that_took_the_lock_over_holds_it_when_its_parent_has_let_go(tmp_path):
    file = tmp_path / "lock"
    own = RunLock(file, "a")
    with hold(file, str(own.descriptor), pass_fds=[own.descriptor]) as child:
        own.release()
        with pytest.raises(HeldRunError, match=f"process {child.pid}"):
            RunLock(file, "a")
        child.kill()
    RunLock(file, "a").release()


def test_what_was_passed_on_counts_for_its_file_alone(tmp_path, monkeypatch):
    with RunLock(tmp_path / "lock", "a") as held:
        (tmp_path / "other").touch()
        for file, expected in ((tmp_path / "lock", held.descriptor), (tmp_path / "other", None)):
            monkeypatch.setenv(lock.LOCK_VARIABLE, str(held.descriptor))
            assert lock._find_passed_on(file) == expected
            assert lock.LOCK_VARIABLE not in os.environ
    for value in ("", "x", "99999"):
        monkeypatch.setenv(lock.LOCK_VARIABLE, value)
        assert lock._find_passed_on(tmp_path / "lock") is None


def test_without_the_systems_locks_the_holders_record_decides(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    file = tmp_path / "lock"
    with hold(file) as holder:
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(HeldRunError, match=f"process {holder.pid}"):
            RunLock(file, "a")
        holder.kill()
    with RunLock(file, "a"):
        assert "file system without locks" in caplog.text
        record = json.loads(file.read_text())
    assert file.read_text() == ""
    record["process"]["place"] = "another host"
    file.write_text(json.dumps(record))
    with pytest.raises(HeldRunError, match=r"If that process is gone, remove .*lock"):  # nobody here can tell
        RunLock(file, "a")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "[" * 9_000])
def test_a_record_that_is_damaged_names_nobody(tmp_path, content):
    file = tmp_path / "lock"
    with RunLock(file, "a"):
        file.write_text(content)
        with pytest.raises(HeldRunError, match="run a is being made by another process"):
            RunLock(file, "a")


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        RunLock(tmp_path / "lock", "a")
    assert (tmp_path / "precious").read_text() == "kept"
    with suppress(FileNotFoundError):
        (tmp_path / "lock").unlink()
