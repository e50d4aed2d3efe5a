"""Runs written by the unmodified W&B client, against a server on loopback or none, and read back."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import psutil
import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.tracking import NullTracker, open_source
from fwlora.experiment.tracking.wandb.reading import WandbSource
from tests.helpers.wandb_runs import (
    CONFIG,
    OFFLINE,
    SUMMARY,
    TARGET,
    as_json,
    content,
    expected,
    follow_advice,
    load,
    rows,
    run_folders,
    start,
    write,
)
from tests.helpers.wandb_server import API_KEY, ENTITY, StoredRun, WandbServer

pytestmark = pytest.mark.usefixtures("client")


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
    assert as_json(api) == as_json(files)
    assert (api.source, Path(files.source).parent) == ("team/project/a", tmp_path / "a" / "wandb")
    assert api.place == files.place == "team/project/a"
    assert capfd.readouterr() == ("", "")


def test_resumed_run_has_each_step_once(server: WandbServer, tmp_path: Path) -> None:
    write(start(TARGET, tmp_path), [1, 2, 3, 4, 5, 6], scale=1.0, exit_code=1)
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert api.state == "failed" and as_json(api) == as_json(files)
    write(start(TARGET, tmp_path), [5, 6, 7], scale=2.0)
    assert len(server.run("a").lines) == 9
    (api,), (files,) = load(tmp_path, "api"), load(tmp_path, "files")
    assert content(api)["history"] == expected(rows([1, 2, 3, 4]), rows([5, 6, 7], scale=2.0))
    assert api.finished and api.config["resolved"]["scale"] == 2.0
    assert as_json(api) == as_json(files)


def test_a_run_that_only_has_the_name_is_found_by_it_the_newest_first(server: WandbServer, tmp_path: Path) -> None:
    for wandb_id, scale in (("x1", 1.0), ("x2", 2.0), ("other", 3.0)):
        write(start(TARGET, tmp_path, run_id=wandb_id), [1, 2], scale=scale)
        server.run(wandb_id).display_name = "a" if wandb_id != "other" else "b"
    (found,) = load(tmp_path / "elsewhere", "api")
    assert (found.run_id, found.source) == ("a", "team/project/a")
    assert content(found)["history"] == expected(rows([1, 2], scale=2.0))
    write(start(TARGET, tmp_path), [1, 2, 3])
    (found,) = load(tmp_path / "elsewhere", "api")
    assert content(found)["history"] == expected(rows([1, 2, 3])), "an id comes before a name"


def test_a_run_that_is_open_on_the_server_is_said_and_continued(
    server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(start(TARGET, tmp_path), [1, 2])
    assert "is open since" not in caplog.text
    server.run("a").state = "running"  # as another machine leaves it that works on it, or was killed
    write(start(TARGET, tmp_path / "second"), [2, 3])
    assert caplog.text.count("W&B: run a is open since 2026-01-01T00:00:00Z. If another job is at it") == 1
    (api,) = load(tmp_path / "elsewhere", "api")
    assert [row["global_step"] for row in api.history] == [1, 2, 3]


def test_runs_of_a_mode_that_is_recorded_apart_count_in_their_own_project_alone(tmp_path: Path) -> None:
    pilot = OFFLINE.model_copy(update={"project": "project-pilot"})
    for settings, mode, scale in ((pilot, "pilot", 1.0), (OFFLINE, "full", 2.0), (pilot, "pilot", 3.0)):
        tracker = start(settings, tmp_path)
        tracker.update_config({"mode": mode, "wandb": {"project": settings.project}})
        write(tracker, [1, 2], scale=scale)
    (full,) = load(tmp_path, "files")
    assert content(full)["history"] == expected(rows([1, 2], scale=2.0))
    (apart,) = WandbSource(tmp_path, "files", ENTITY, "project-pilot").load(["a"])
    assert content(apart)["history"] == expected(rows([1, 2], scale=3.0))
    (tmp_path / "a" / "wandb" / Path(full.source).name).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"W&B's files in .*a/wandb are of the project project-pilot"):
        load(tmp_path, "files")


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
    follow_advice(line)
    (api,) = load(tmp_path, "api")
    assert as_json(api) == as_json(files)


NO_KEY, SHORT_KEY, WRONG_KEY = None, "abc", API_KEY[::-1]


@pytest.mark.parametrize(
    ("key", "fault", "entity", "said"),
    [
        (NO_KEY, None, "team", "no API key (set WANDB_API_KEY"),
        (SHORT_KEY, None, "team", "API key must have 40+ characters, has 3"),
        (WRONG_KEY, None, "team", "does not accept the API key"),
        (API_KEY, "stopped", "team", "within 1 s (dial tcp"),
        (API_KEY, 500, "team", "within 1 s (HTTP 500"),
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
    fault: int | str | None,
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
        server.fault = fault  # type: ignore[assignment]
    lines: list[str] = []
    started = time.monotonic()
    tracker = start(TARGET.model_copy(update={"entity": entity}), tmp_path, lines=lines, patience_s=1.0)
    tracker.log({"global_step": 1, "train_loss": 0.5})
    tracker.finish()
    assert time.monotonic() - started < 15
    (line,) = lines
    assert said in line and ". The run goes on offline" in line and "wandb sync " in line
    assert [folder.name.split("-2")[0] for folder in run_folders(tmp_path)] == ["offline-run"]
    assert Path(line.rpartition("wandb sync ")[2]) == run_folders(tmp_path)[0]
    assert tracker.url is None and capfd.readouterr() == ("", "")


def test_required_server_that_is_unusable_is_an_error(server: WandbServer, tmp_path: Path) -> None:
    server.stop()
    with pytest.raises(UserError, match=r"wandb\.required=true.*within 1 s"):
        start(TARGET.model_copy(update={"required": True}), tmp_path, patience_s=1.0)
    assert run_folders(tmp_path) == []


def test_disabled_run_leaves_nothing(tmp_path: Path) -> None:
    tracker = start(TARGET.model_copy(update={"mode": "disabled"}), tmp_path)
    write(tracker, [1, 2])
    assert isinstance(tracker, NullTracker) and not (tmp_path / "a").exists()


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(UserError, match=r"run `a` cannot be recorded in .*File exists"):
        start(OFFLINE, tmp_path)


def test_value_that_cannot_be_recorded_is_announced_once_and_stops_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = start(OFFLINE, tmp_path, lines=lines)
    tracker.log({"global_step": 1, "train_loss": "high"})
    tracker.set_summary({"final_accuracy": object()})
    write(tracker, [1, 2])
    assert len(lines) == 2 and "`train_loss` is a str" in lines[1]
    assert load(tmp_path, "files")[0].history == rows([1, 2])


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
        load(tmp_path, "auto", "a", "b", timeout_s=2)
    said = "no API key (set WANDB_API_KEY" if fault == "no key" else f"no usable answer from {server.url} within 2 s"
    assert str(caught.value).count("W&B could not be asked: " + said) == 1
    assert len(str(caught.value).splitlines()) == 4


def test_unknown_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`source` is 'web'; it must be auto, api or files"):
        open_source(TARGET, results_dir=tmp_path, source="web")


@pytest.mark.slow
def test_twenty_runs_of_ten_thousand_rows_are_read_from_the_server_in_time(server: WandbServer, tmp_path: Path) -> None:
    steps = range(1, 10_001)
    names = ("train_loss", "epoch", "learning_rate", "gradient_norm", "penalty", "fisher_warmup")
    lines = [
        json.dumps(
            {"_step": step - 1, "_timestamp": 1.8e9 + step, "global_step": step} | dict.fromkeys(names, 1 / step)
        )
        for step in steps
    ]
    run_ids = [f"run-{number}" for number in range(20)]
    for run_id in run_ids:
        run = StoredRun(TARGET.entity, TARGET.project, run_id, display_name=run_id, state="finished")
        run.store_lines(0, lines)
        server.runs[TARGET.entity, TARGET.project, run_id] = run
    process = psutil.Process()
    before, started = process.memory_info().rss, time.monotonic()
    records = load(tmp_path, "api", *run_ids)
    seconds, grown_mib = time.monotonic() - started, (process.memory_info().rss - before) / 2**20
    assert [len(record.history) for record in records] == [len(steps)] * len(run_ids)
    assert records[-1].history[-1] == {"global_step": steps[-1]} | dict.fromkeys(names, 1 / steps[-1])
    assert seconds < 30 and grown_mib < 700, (seconds, grown_mib)
