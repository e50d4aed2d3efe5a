"""A tracker of a third party: chosen by its name, written, read back; and what the registry refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.request import parse_request, usage
from fwlora.experiment.settings.hydra_arguments import compose_settings, prepare_arguments
from fwlora.experiment.tracking import (
    NullTracker,
    RecordSource,
    Tracker,
    TrackerSettings,
    environment_defaults,
    known_trackers,
    open_source,
    open_tracker,
    register_tracker,
    text_keys,
)
from fwlora.experiment.tracking.records import RunRecord, UnreadableRunsError
from fwlora.experiment.tracking.wandb import WandbSettings
from tests.helpers.evaluation_records import make_record
from tests.helpers.paths import CONFIG_DIR, REPOSITORY
from tests.helpers.toy_tracker import ToySettings, ToyTracker, registered_toy

RUN = "comparative-1-roberta-base-110M--CoLA-GLUE"
MAIN = [f"run={RUN}", "mode=full", "results_dir=out"]
EVALUATE = ["results_dir=out", f'run_ids=["{RUN}"]']


@pytest.fixture
def toy() -> Iterator[None]:
    with registered_toy():
        yield


@pytest.mark.usefixtures("toy")
def test_a_run_is_written_and_read_back_by_the_chosen_tracker(tmp_path: Path):
    settings = compose_settings([*MAIN, "tracker=toy", f"toy.folder={tmp_path}"], CONFIG_DIR, {})
    assert settings.tracker_settings == ToySettings(folder=str(tmp_path)) and not hasattr(settings, "wandb")
    config = {**settings.as_record(), "resolved": {"precision": "fp32"}}
    tracker = open_tracker(settings, run_id=RUN, config=config, directory=tmp_path / "unused")
    tracker.log({"global_step": 1, "train_loss": 0.5})
    tracker.log({"global_step": 2, "train_loss": math.inf})
    tracker.update_config({"resolved": {"precision": "bf16"}})
    tracker.set_summary({"completed": True})
    tracker.finish()

    request = parse_request([*EVALUATE, "tracker=toy", f"toy.folder={tmp_path}"], {}, CONFIG_DIR / "config.yaml")
    source = open_source(request.tracker_settings, results_dir=request.results_dir, source=request.source)
    (record,) = source.load(request.run_ids)
    assert record.config["toy"] == {"folder": str(tmp_path), "depth": 1} and record.config["run"]["run_id"] == RUN
    assert not {"tracker", "wandb"} & set(record.config)
    assert record == RunRecord(
        run_id=RUN,
        config={**record.config, "resolved": {"precision": "bf16"}},
        summary={"completed": True},
        history=[{"global_step": 1, "train_loss": 0.5}, {"global_step": 2, "train_loss": math.inf}],
        state="finished",
        source=str(tmp_path / f"{RUN}.jsonl"),
    )
    with pytest.raises(UnreadableRunsError, match="`gone`: no file ") as raised:
        source.load([RUN, "gone"])
    assert list(raised.value.reasons) == ["gone"]


def test_the_record_of_the_default_tracker_is_what_it_was():
    settings = compose_settings(MAIN, CONFIG_DIR, {})
    record = settings.as_record()
    assert list(record) == ["run", "results_dir", "mode", "wandb", "engine"]
    assert record["wandb"] == {
        "entity": "gengaru617-personal", "project": "251106-test", "mode": "online", "required": False,
    }  # fmt: skip
    assert record == {**settings.model_dump(exclude={"resume"}), "engine": settings.engine.model_dump()}


@pytest.mark.usefixtures("toy")
def test_a_trial_is_recorded_by_no_tracker(tmp_path: Path):
    arguments = [f"run={RUN}", "mode=trial", "results_dir=out", "tracker=toy", f"toy.folder={tmp_path / 'toy'}"]
    settings = compose_settings(arguments, CONFIG_DIR, {})
    tracker = open_tracker(settings, run_id=RUN, config=settings.as_record(), directory=tmp_path / "run")
    assert isinstance(tracker, NullTracker) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="`a` is a set"):
        open_tracker(settings, run_id=RUN, config={"a": {1}}, directory=tmp_path)


@pytest.mark.usefixtures("toy")
def test_values_come_from_the_command_line_then_the_environment_then_the_configuration(tmp_path: Path):
    config_path = tmp_path / "config.yaml"
    config_path.write_text("results_dir: r\ntracker: toy\ntoy: {folder: from-file, depth: 2}\nwandb: {entity: e}\n")
    assert parse_request(EVALUATE, {}, config_path).tracker_settings == ToySettings(folder="from-file", depth=2)
    environment = {"TOY_FOLDER": "from-environment"}
    request = parse_request([*EVALUATE, "toy.depth=3"], environment, config_path)
    assert request.tracker_settings == ToySettings(folder="from-environment", depth=3)
    request = parse_request([*EVALUATE, "toy.folder=12"], environment, config_path)
    assert request.tracker_settings == ToySettings(folder="12", depth=2)
    assert environment_defaults()["toy.folder"] == "TOY_FOLDER" and text_keys() >= {"toy.folder", "wandb.entity"}
    assert prepare_arguments([*MAIN, "tracker=toy"], CONFIG_DIR, environment)[-1] == "++toy.folder='from-environment'"
    settings = compose_settings([*MAIN, "tracker=toy"], CONFIG_DIR, {**environment, "WANDB_MODE": "offline"})
    assert settings.tracker_settings == ToySettings(folder="from-environment")
    assert "[toy.folder=<value>]" in usage() and "[tracker=wandb|toy]" in usage()


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["nope", "12", "[toy]"])
def test_an_unknown_tracker_is_one_mistake_that_lists_the_known_ones(name: str):
    with pytest.raises(UserError) as raised:
        compose_settings([*MAIN, f"tracker={name}"], CONFIG_DIR, {})
    assert str(raised.value).endswith(f": tracker = {name!r}: input should be one of wandb, toy")
    with pytest.raises(UserError) as raised:
        parse_request([*EVALUATE, f"tracker={name}"], {}, CONFIG_DIR / "config.yaml")
    assert str(raised.value) == f"command line: tracker is {name!r}; one of wandb, toy is expected"


@pytest.mark.usefixtures("toy")
def test_mistakes_in_a_trackers_settings_are_named_by_key():
    with pytest.raises(UserError) as raised:
        compose_settings([*MAIN, "tracker=toy", "toy.color=red"], CONFIG_DIR, {})
    assert "toy.folder: missing" in str(raised.value) and "toy.color: unknown key" in str(raised.value)
    with pytest.raises(UserError) as raised:
        parse_request([*EVALUATE, "tracker=toy"], {}, CONFIG_DIR / "config.yaml")
    assert str(raised.value).startswith("command line: toy.folder is not set; give toy.folder=<value>, or set it in ")
    for depth in ("deep", "[1"):
        with pytest.raises(UserError) as raised:
            parse_request([*EVALUATE, "tracker=toy", "toy.folder=a", f"toy.depth={depth}"], {}, CONFIG_DIR / "x.yaml")
        assert str(raised.value).startswith(f"command line: toy.depth = {depth!r}: input should be a valid integer")
    with pytest.raises(UserError, match=r"'toy\.color' is unknown; known: .* toy\.folder, toy\.depth$"):
        parse_request([*EVALUATE, "tracker=toy", "toy.folder=a", "toy.color=red"], {}, CONFIG_DIR / "config.yaml")


def test_names_that_are_taken_are_refused():
    with pytest.raises(ValueError, match="'wandb' is taken by WandbSettings"):
        register_tracker("wandb", ToySettings)
    for name in ("run", "tracker", "results_dir", "not-an-identifier", ""):
        with pytest.raises(ValueError, match="cannot name a tracker's settings"):
            register_tracker(name, ToySettings)
    register_tracker("wandb", WandbSettings)
    assert known_trackers() == {"wandb": WandbSettings}


def test_an_incomplete_tracker_cannot_be_made(tmp_path: Path):
    class Forgetful(Tracker):
        def log(self, values):
            return

    class Empty(TrackerSettings):
        pass

    for make in (Forgetful, RecordSource, Empty):
        with pytest.raises(TypeError, match="abstract"):
            make()


PLUGIN = "from tests.helpers.toy_tracker import ToySettings, register_tracker\nregister_tracker('toy', ToySettings)\n"


def run_with_plugin(tmp_path: Path, code: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program with a package installed that is a plugin."""
    folder = tmp_path / "site"
    (folder / "toy_plugin-1.0.dist-info").mkdir(parents=True, exist_ok=True)
    (folder / "toy_plugin-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1\n"
    )
    (folder / "toy_plugin-1.0.dist-info" / "entry_points.txt").write_text("[fwlora]\ntoy = toy_plugin\n")
    (folder / "toy_plugin.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def test_evaluation_reads_the_records_of_a_plugins_tracker(tmp_path: Path):
    records = [make_record("p", "proposed_fw_lora"), make_record("b", "baseline_lora", error_rate=0.2)]
    for record in records:
        tracker = ToyTracker(tmp_path / "toy" / f"{record.run_id}.jsonl", record.config)
        for row in record.history:
            tracker.log(row)
        tracker.set_summary(record.summary)
        tracker.finish()
    arguments = [f"results_dir={tmp_path / 'results'}", 'run_ids=["p","b"]', "tracker=toy"]
    done = run_with_plugin(tmp_path, PLUGIN, "src.evaluate", *arguments, f"toy.folder={tmp_path / 'toy'}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results" / "p" / "metrics.json").read_text())
    assert metrics["summary"]["final_eval_accuracy"] == records[0].summary["final_eval_accuracy"]


@pytest.mark.parametrize(
    "command",
    [
        ("src.main", *MAIN),
        ("src.train", *MAIN),
        ("src.evaluate", *EVALUATE),
        ("fwlora.experiment.cli", "plan", "roberta-base", "--budget", "0.2"),
        ("fwlora.experiment.cli", "study", "quickstart"),
    ],
)
def test_every_program_imports_plugins_and_names_a_broken_one(tmp_path: Path, command: tuple[str, ...]):
    done = run_with_plugin(tmp_path, "raise RuntimeError('no license')", *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: plugins that cannot be imported: "
        "toy = 'toy_plugin' of toy-plugin (no license); repair or uninstall it\n"
    )
