"""Requests to stop: where they take effect, what two of them do, and that nothing outlives its time or its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from fwlora.experiment.stopping import SIGNALS
from tests.helpers.paths import REPOSITORY

STEPS = """
import os, signal, sys, time
from fwlora.experiment.stopping import Stopper, StopRequested
stopper = Stopper(patience_s=float(sys.argv[2]))
stopper.install()
what = sys.argv[1]
try:
    if what == "at once":
        print("ready", flush=True)
        time.sleep(30)
    with stopper.deferred():
        print("ready", flush=True)
        if what == "busy":  # a step that lasts, in code that runs no handler
            import hashlib
            hashlib.pbkdf2_hmac("sha256", b"", b"", 40_000_000)
        for step in range(1000):
            time.sleep(0.05)
            if stopper.requested:
                print("noted", flush=True)
                if what == "slow":
                    time.sleep(20)
                stopper.check()
except StopRequested as stop:
    print(stop, flush=True)
    sys.exit(stop.exit_code)
"""


def start(what: str, patience_s: float = 5.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STEPS, what, str(patience_s)]
    # Processes in the background, as those of pytest's workers, ignore some signals and hand that on.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("what", ["at once", "between steps"])
def test_a_request_stops_at_once_or_between_steps_and_names_its_signal(number, what):
    with start(what) as process:
        process.send_signal(number)
        told, errors = process.communicate(timeout=20)
    assert told.splitlines() == [*(["noted"] if what == "between steps" else []), f"stopped by {number.name}"]
    assert (process.returncode, errors) == (128 + number, "")


def test_a_second_request_ends_the_process_but_one_at_the_same_time_does_not():
    with start("slow", 30.0) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None and process.stdout.readline() == "noted\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(1.0)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT and time.monotonic() - asked < 5


@pytest.mark.parametrize("what", ["slow", "busy"])
def test_patience_ends_whatever_the_process_is_doing(what):
    with start(what, 1.0) as process:
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and 0.9 < time.monotonic() - asked < 5
    assert errors == "not stopped after 1 s; what was saved before counts\n"


def test_a_signal_that_is_ignored_stays_ignored():
    code = STEPS.replace("stopper.install()", "signal.signal(signal.SIGHUP, signal.SIG_IGN); stopper.install()")
    command = [sys.executable, "-c", code, "at once", "5"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


PARENT = """
import os, subprocess, sys, time
from fwlora.experiment.stopping import name_parent
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "between steps", "5"], env={**os.environ, **name_parent()})
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_stops_when_its_parent_was_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, STEPS], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline(), parent.stdout.readline()}
        assert "ready\n" in lines
        parent.kill()
        # The child has the pipe as well: its end is the end of what can be read.
        assert parent.stdout.read().splitlines() == ["noted", "stopped by SIGTERM"]
