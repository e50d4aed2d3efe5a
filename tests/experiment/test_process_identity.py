"""A process is told from a later one with its number, and from one of another machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from fwlora.experiment import process_identity
from fwlora.experiment.process_identity import ProcessIdentity


def test_this_process_lives_and_its_record_names_it():
    own = ProcessIdentity.of_this_process()
    assert own.pid == os.getpid() and own.lives() is True
    assert ProcessIdentity.from_record(own.to_record()) == own


def test_a_later_process_with_the_number_is_another_one():
    own = ProcessIdentity.of_this_process()
    assert replace(own, started=own.started - 60).lives() is False
    assert replace(own, pid=2**22 + 5).lives() is False


def test_a_process_that_has_ended_but_was_not_waited_for_does_not_live():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        child = replace(
            ProcessIdentity.of_this_process(), pid=process.pid, started=process_identity._find_start(process.pid)
        )
        assert child.lives() is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert child.lives() is False


def test_of_another_machine_nothing_is_known():
    assert replace(ProcessIdentity.of_this_process(), place="elsewhere").lives() is None


@pytest.mark.parametrize("record", [None, 7, "x", [], {}, {"place": "a", "pid": "x", "started": 1}, {"pid": 1}])
def test_anything_else_names_no_process(record):
    assert ProcessIdentity.from_record(record) is None


def test_a_process_lives_whatever_the_clock_says(monkeypatch):
    own = ProcessIdentity.of_this_process()
    monkeypatch.setattr(psutil, "boot_time", lambda: 1.0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1.0)
    assert own.lives() is True
