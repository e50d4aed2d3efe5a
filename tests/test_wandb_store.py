"""Runs written by the unmodified W&B client, against a server on loopback or none, and read back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.records import RunRecord
from fwlora.experiment.tracking import NullTracker, Tracker, spell_non_finite
from fwlora.experiment.wandb_store import WandbTarget, end_session, load_records, start_tracker
from tests.wandb_server import API_KEY, ENTITY, WandbServer

TARGET = WandbTarget(entity=ENTITY, project="project", mode="online")
OFFLINE = replace(TARGET, mode="offline")
CONFIG = {"run": {"run_id": "a", "training": {"learning_rate": 2e-4, "betas": [0.9, 0.999]}}}
SUMMARY = {
    "completed": True,
    "final_accuracy": 0.5,
    "best_accuracy": math.inf,
    "module_ranks": list(range(72)),
    "module_importances": [None, 0.25],
    "eval_predictions": {"encoding": "bits", "count": 3, "data": "oA==", "nested": {"a.b": 1}},
}


@pytest.fixture(autouse=True)
def isolated_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the machine's W&B login and settings nor an earlier test's session reach a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    end_session(3.0)
    yield
    end_session(3.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        yield running


def start(target: WandbTarget, results: Path, run_id: str = "a", lines: list[str] | None = None) -> Tracker:
    announce = [].append if lines is None else lines.append
    timeouts = {"init_timeout_s": 1.0, "finish_timeout_s": 1.0}
    return start_tracker(
        target, run_id=run_id, config=CONFIG, directory=results / run_id, announce=announce, **timeouts
    )


def rows(steps: Sequence[int], scale: float = 1.0) -> list[dict[str, float]]:
    """Rows whose loss tells by which attempt they were logged; step 3 diverged."""
    return [{"global_step": step, "train_loss": math.nan if step == 3 else scale / step} for step in steps]


def write(tracker: Tracker, steps: Sequence[int], scale: float = 1.0, exit_code: int = 0) -> None:
    for row in rows(steps, scale):
        tracker.log(row)
    tracker.update_config({"resolved": {"task": "sst2", "scale": scale, "unknown": math.nan}})
    tracker.set_summary(SUMMARY)
    tracker.finish(exit_code)


def load(results: Path, source: str, *run_ids: str) -> list[RunRecord]:
    place = {"entity": TARGET.entity, "project": TARGET.project}
    return load_records(run_ids or ["a"], results_dir=results, source=source, timeout_s=2, **place)


def content(record: RunRecord) -> dict[str, object]:
    """All of a record but where it was read, comparable: NaN by its name."""
    return {name: spell_non_finite(value) for name, value in vars(record).items() if name != "source"}


def expected(*parts: list[dict[str, float]]) -> list[dict[str, object]]:
    return spell_non_finite([row for part in parts for row in part])


def run_folders(results: Path, run_id: str = "a") -> list[str]:
    return sorted(path.name.split("-2")[0] for path in (results / run_id).glob("wandb/*run-2*"))


def sync(line: str, working_folder: Path) -> None:
    """Follow the advice at the end of an announced line."""
    command = line[line.index("wandb sync ") :].split()
    subprocess.run([sys.executable, "-m", *command], cwd=working_folder, capture_output=True, check=True)


def test_online_run_reaches_the_server_whole_and_reads_back_the_same_from_both_sources(
    server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    lines: list[str] = []
    tracker = start(TARGET, tmp_path, lines=lines)
    steps = range(1, 1202)  # more than one page of the history, which W&B samples to 500 rows
    write(tracker, steps)

    stored = server.run("a")
    assert (stored.state, stored.display_name, len(stored.lines)) == ("finished", "a", len(steps))
    assert lines == [f"W&B run: {server.url}/team/project/runs/a"] == [f"W&B run: {tracker.url}"]
    assert "diff.patch" not in stored.uploads and not [name for name in stored.uploads if name.startswith("code")]

    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == expected(rows(steps))
    assert api.finished and api.config["run"] == CONFIG["run"] and math.isnan(api.config["resolved"]["unknown"])
    last_values = {"global_step": 1201, "train_loss": 1 / 1201}
    assert api.summary == SUMMARY | last_values
    assert content(api) == content(files)
    assert (api.source, Path(files.source).parent) == ("team/project/a", tmp_path / "a" / "wandb")
    assert capfd.readouterr() == ("", "")


def test_resumed_run_has_each_step_once(server: WandbServer, tmp_path: Path) -> None:
    write(start(TARGET, tmp_path), [1, 2, 3, 4, 5, 6], scale=1.0, exit_code=1)
    assert not load(tmp_path, "api")[0].finished
    write(start(TARGET, tmp_path), [5, 6, 7], scale=2.0)
    assert len(server.run("a").lines) == 9
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == expected(rows([1, 2, 3, 4]), rows([5, 6, 7], scale=2.0))
    assert api.finished and api.config["resolved"]["scale"] == 2.0
    assert content(api) == content(files)


def test_offline_run_reads_the_same_before_and_after_it_is_sent(
    server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    tracker = start(OFFLINE, tmp_path, lines=lines)
    write(tracker, range(1, 30))
    (line,) = lines
    folder = Path(line.rpartition("wandb sync ")[2])
    assert folder.parent == tmp_path / "a" / "wandb" and folder.name.startswith("offline-run-")
    assert tracker.url is None and capfd.readouterr() == ("", "")
    assert server.operations == []

    (files,) = load(tmp_path, "auto")
    assert files.source == str(folder) and server.operations == []
    assert content(files)["history"] == expected(rows(range(1, 30)))
    sync(line, tmp_path)
    (api,) = load(tmp_path, "api")
    assert content(api) == content(files)


NO_KEY, SHORT_KEY, WRONG_KEY = None, "abc", API_KEY[::-1]


@pytest.mark.parametrize(
    ("key", "fault", "entity", "said"),
    [
        (NO_KEY, None, "team", "no API key (set WANDB_API_KEY"),
        (SHORT_KEY, None, "team", "API key must have 40+ characters, has 3"),
        (WRONG_KEY, None, "team", "does not accept the API key"),
        (API_KEY, "stopped", "team", "within 1 s (dial tcp"),
        (API_KEY, "error", "team", "within 1 s (HTTP 500"),
        (API_KEY, "hang", "team", "within 1 s."),
        (API_KEY, None, "other", "no access to `other/project` (permission denied); WANDB_ENTITY"),
    ],
)
def test_unusable_server_costs_one_line_and_the_run_goes_on_offline(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    key: str | None,
    fault: str | None,
    entity: str,
    said: str,
) -> None:
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY")
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)
    if fault == "stopped":
        server.stop()
    else:
        server.fault = fault
    lines: list[str] = []
    started = time.monotonic()
    tracker = start(replace(TARGET, entity=entity), tmp_path, lines=lines)
    tracker.log({"global_step": 1, "train_loss": 0.5})
    tracker.finish()
    assert time.monotonic() - started < 15
    (line,) = lines
    assert said in line and ". The run goes on offline" in line and "wandb sync " in line
    assert run_folders(tmp_path) == ["offline-run"]
    assert (Path(line.rpartition("wandb sync ")[2]) / "run-a.wandb").is_file()
    assert tracker.url is None and capfd.readouterr() == ("", "")


def test_required_server_that_is_unusable_is_an_error(server: WandbServer, tmp_path: Path) -> None:
    server.stop()
    with pytest.raises(UserError, match=r"wandb\.required=true.*within 1 s"):
        start(replace(TARGET, required=True), tmp_path)
    assert run_folders(tmp_path) == []


def test_disabled_run_leaves_nothing(tmp_path: Path) -> None:
    tracker = start(replace(TARGET, mode="disabled"), tmp_path)
    write(tracker, [1, 2])
    assert isinstance(tracker, NullTracker) and not (tmp_path / "a").exists()


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(UserError, match=r"run `a` cannot be recorded in .*File exists"):
        start(OFFLINE, tmp_path)


@pytest.mark.parametrize("fault", ["error", "hang"])
def test_server_that_fails_half_way_loses_nothing(server: WandbServer, tmp_path: Path, fault: str) -> None:
    lines: list[str] = []
    tracker = start(TARGET, tmp_path, lines=lines)
    tracker.log(rows([1])[0])
    server.fault = fault
    started = time.monotonic()
    write(tracker, range(2, 20))
    tracker.finish()
    assert time.monotonic() - started < 8
    assert len(lines) == 2 and lines[1].startswith("W&B: the upload is not complete; nothing is lost")
    assert server.run("a").state == "running"

    server.fault = None
    sync(lines[1], tmp_path)
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == expected(rows(range(1, 20)))
    assert api.finished and content(api) == content(files)


def test_value_that_cannot_be_recorded_is_announced_once_and_stops_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = start(OFFLINE, tmp_path, lines=lines)
    tracker.log({"global_step": 1, "train_loss": "high"})
    tracker.set_summary({"final_accuracy": object()})
    write(tracker, [1, 2])
    assert len(lines) == 2 and "`train_loss` is a str" in lines[1]
    assert load(tmp_path, "files")[0].history == rows([1, 2])


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


def test_unfinished_local_run_is_looked_up_on_the_server(server: WandbServer, tmp_path: Path) -> None:
    write(start(OFFLINE, tmp_path), [1, 2], exit_code=1)
    (record,) = load(tmp_path, "auto")
    assert not record.finished and record.source.startswith(str(tmp_path))
    write(start(TARGET, tmp_path / "elsewhere"), [1, 2, 4])
    (record,) = load(tmp_path, "auto")
    assert record.finished and record.source == "team/project/a"


def test_all_runs_that_are_found_nowhere_are_listed_at_once(server: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "proposed-cola" / "wandb").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        load(tmp_path, "auto", "proposed-cola-", "other")
    heading, first, second = str(caught.value).splitlines()
    assert heading == "runs that cannot be read (2 problems):"
    assert f"`proposed-cola-`: no W&B files in {tmp_path}/proposed-cola-/wandb (there are: proposed-cola)" in first
    assert "`other`: no W&B files in" in second
    assert second.endswith("W&B has no run team/project/other (are WANDB_ENTITY and WANDB_PROJECT right?)")


@pytest.mark.parametrize("fault", ["no key", "stopped"])
def test_server_that_cannot_be_asked_is_said_once(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    server.stop()
    with pytest.raises(UserError) as caught:
        load(tmp_path, "auto", "a", "b")
    said = "no API key (set WANDB_API_KEY" if fault == "no key" else f"no usable answer from {server.url} within 2 s"
    assert str(caught.value).count("W&B could not be asked: " + said) == 1
    assert len(str(caught.value).splitlines()) == 4


def test_unknown_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`source` is 'web'; it must be auto, api or files"):
        load(tmp_path, "web")
