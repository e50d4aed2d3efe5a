"""Servers that fail, processes that are killed: what was logged can be sent and is read, each row once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.helpers.killed_run import KILLED_CONFIG, KILLED_SCALE
from tests.helpers.wandb_runs import (
    CONFIG,
    OFFLINE,
    TARGET,
    Outage,
    as_json,
    break_server,
    content,
    expected,
    follow_advice,
    kill_half_way,
    load,
    repair_server,
    rows,
    run_folders,
    start,
    sync,
    write,
)
from tests.helpers.wandb_server import WandbServer

pytestmark = pytest.mark.usefixtures("client")


@pytest.mark.parametrize(
    ("outage", "cause"),
    [
        ("stopped", "no usable answer in time"),
        (500, "no usable answer in time"),
        ("hang", "no usable answer in time"),
        (401, "HTTP 401"),
    ],
)
def test_server_that_fails_half_way_loses_nothing(
    server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], outage: Outage, cause: str
) -> None:
    lines: list[str] = []
    tracker = start(TARGET, tmp_path, lines=lines, patience_s=2.0)
    tracker.log(rows([1])[0])
    break_server(server, outage)
    started = time.monotonic()
    write(tracker, range(2, 20))
    tracker.finish()
    assert time.monotonic() - started < 12
    said = (
        f"W&B: the upload is not complete ({cause}); nothing is lost, send the rest with: wandb sync --include-online"
    )
    assert lines[1:] == [f"{said} {run_folders(tmp_path)[0]}"]
    assert server.run("a").state == "running"
    assert capfd.readouterr() == ("", "")

    (before,) = load(tmp_path, "files")
    assert before.finished and content(before)["history"] == expected(rows(range(1, 20)))
    repair_server(server, outage)
    follow_advice(lines[1])
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert as_json(api) == as_json(files) == as_json(before)


@pytest.mark.parametrize("outage", [429, 503, "stopped"])
def test_server_that_recovers_gets_everything(server: WandbServer, tmp_path: Path, outage: Outage) -> None:
    lines: list[str] = []
    tracker = start(TARGET, tmp_path, lines=lines)
    tracker.log(rows([1])[0])
    break_server(server, outage)
    threading.Timer(1.0, repair_server, (server, outage)).start()
    write(tracker, range(2, 20))
    assert len(lines) == 1 and server.run("a").state == "finished"
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == expected(rows(range(1, 20)))
    assert as_json(api) == as_json(files)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_killed_run_keeps_what_it_logged_and_goes_on_under_its_id(
    server: WandbServer, tmp_path: Path, mode: str
) -> None:
    kill_half_way(mode, tmp_path, [1, 2, 3, 4, 5, 6])
    (killed,) = load(tmp_path, "files")
    assert content(killed)["history"] == expected(rows([1, 2, 3, 4, 5, 6], KILLED_SCALE))
    assert killed.config == KILLED_CONFIG and killed.summary["only_killed"] == 1 and not killed.finished

    write(start(TARGET.model_copy(update={"mode": mode}), tmp_path), [5, 6, 7], scale=2.0)
    (files,) = load(tmp_path, "files")
    assert files.finished and content(files)["history"] == expected(
        rows([1, 2, 3, 4], KILLED_SCALE), rows([5, 6, 7], 2.0)
    )
    assert files.config["run"] == CONFIG["run"] and files.config["only_killed"] == 1

    for _ in range(2):
        for folder in run_folders(tmp_path):
            sync("--include-online", "--include-synced", folder)
        (api,) = load(tmp_path, "api")
        assert as_json(api) == as_json(files)
    assert len(server.run("a").lines) >= 2 * 9, "the server did get rows twice"


def test_attempts_of_an_offline_run_are_sent_by_one_command(server: WandbServer, tmp_path: Path) -> None:
    write(start(OFFLINE, tmp_path), [1, 2, 3, 4, 5, 6], scale=1.0, exit_code=1)
    write(start(OFFLINE, tmp_path), [5, 6, 7], scale=2.0)
    for _ in range(2):
        sync(tmp_path / "a" / "wandb")
        (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
        assert as_json(api) == as_json(files)
        assert content(api)["history"] == expected(rows([1, 2, 3, 4]), rows([5, 6, 7], 2.0)) and api.finished
        assert len(server.run("a").lines) == 9, "the second command finds nothing to send"


def test_what_the_server_missed_of_a_first_attempt_can_be_sent_after_the_second(
    server: WandbServer, tmp_path: Path
) -> None:
    lines: list[str] = []
    first = start(TARGET, tmp_path, lines=lines, patience_s=2.0)
    break_server(server, "stopped")
    write(first, [1, 2, 3, 4, 5, 6], exit_code=1)
    repair_server(server, "stopped")
    write(start(TARGET, tmp_path), [5, 6, 7], scale=2.0)
    assert [row["global_step"] for row in load(tmp_path, "api")[0].history] == [5, 6, 7]
    follow_advice(lines[1])
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == content(files)["history"] == expected(rows([1, 2, 3, 4]), rows([5, 6, 7], 2.0))


def test_a_service_that_ended_with_the_process_above_is_not_asked(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell that an ended notebook started inherits the address of its service."""
    client.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path}/gone/socket")
    tracker = start(OFFLINE, tmp_path)
    write(tracker, range(1, 4))
    (record,) = load(tmp_path, "files")
    assert record.finished and content(record)["history"] == expected(rows(range(1, 4)))
