"""Runs that end at every kind of place and are continued by the same command are the runs that never ended."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fwlora.experiment.errors import UserError
from fwlora.experiment.resume.store import CheckpointStore
from fwlora.experiment.search import SearchResult
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.stopping import Stopper, StopRequested
from src.train import run_training
from tests.helpers.full_runs import compose
from tests.helpers.interrupted_runs import (
    Killed,
    Place,
    digest_folder,
    end_at,
    find_results,
    lasting_trackers,
    list_methods,
)

# 30 steps in three epochs, each evaluated in two batches.
METHODS = list_methods(warmup_steps=5)
SEARCHED = ["run.optuna.n_trials=3", "run.optuna.epochs=1"]
STOPS: list[Place] = [("step", 3), ("step", 10), ("step", 17), ("evaluation", 2), ("epoch", 2), ("epoch", 3)]
KILLS: list[Place] = [("step", 4), ("step", 13), ("evaluation", 3), ("epoch", 3), ("summary", 0), ("save", 0)]


@pytest.fixture
def settings_of(tiny_roberta, tiny_glue):
    def make(method: str, *more: str) -> ProgramSettings:
        run_id, own = METHODS[method]
        options = more if any("n_trials" in option for option in more) else ("run.optuna.n_trials=0", *more)
        return compose(run_id, tiny_roberta, tiny_glue, *own, *options)

    return make


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.fixture
def whole_run(whole_runs, settings_of, tmp_path, monkeypatch):
    """Results of a run that was left alone, made once per method and options."""

    def make(method: str, *more: str) -> dict[str, Any]:
        if (method, more) not in whole_runs:
            folder = tmp_path / "whole"
            folder.mkdir()
            with monkeypatch.context() as patch, lasting_trackers(patch) as trackers:
                patch.chdir(folder)
                settings = settings_of(method, *more)
                run_training(settings)
                whole_runs[method, more] = copy.deepcopy(find_results(settings, trackers[settings.run.run_id]))
        return whole_runs[method, more]

    return make


def interrupt(settings: ProgramSettings, monkeypatch: pytest.MonkeyPatch, place: Place, kind: str) -> None:
    stopper = Stopper()
    with monkeypatch.context() as patch:
        end_at(patch, place, kind, stopper)
        with pytest.raises(StopRequested if kind == "stop" else Killed):
            run_training(settings, stopper=stopper)


ENDS = [*(("stop", place) for place in STOPS), *(("kill", place) for place in KILLS)]
# One method at every place, and every method in each of its phases; all others take their minutes when asked.
EVERYWHERE, EVERY_METHOD = "FW-LoRA, reallocation", [("stop", ("step", 3)), ("kill", ("step", 13))]


@pytest.mark.parametrize(
    ("method", "kind", "place"),
    [
        pytest.param(method, *end, marks=[] if method == EVERYWHERE or end in EVERY_METHOD else [pytest.mark.slow])
        for method in METHODS
        for end in ENDS
    ],
)
def test_a_run_that_ended_anywhere_is_continued_to_the_same_bytes(
    method, kind, place, settings_of, whole_run, monkeypatch
):
    expected, settings = whole_run(method), settings_of(method)
    with lasting_trackers(monkeypatch) as trackers:
        interrupt(settings, monkeypatch, place, kind)
        logged = list(trackers[settings.run.run_id].rows)
        assert len(logged) < len(expected["rows"]) or place[0] in ("epoch", "summary", "save")
        run_training(settings)
        found = find_results(settings, trackers[settings.run.run_id])
    assert found["rows"] == expected["rows"], "each row once, in order"
    assert found == expected
    directory = Path("results") / settings.run.run_id
    assert sorted(path.name for path in directory.iterdir()) == ["adapter", "attempts"]
    attempts = [json.loads(path.read_text()) for path in sorted((directory / "attempts").glob("*.json"))]
    assert [(a["number"], a["chain"], a["outcome"]) for a in attempts] == [
        (1, [], "stopped" if kind == "stop" else "failed"), (2, [1], "finished"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["stop", "kill"])
@pytest.mark.parametrize("place", [("trial", 1), ("trial", 3), ("step", 4)])
def test_a_search_makes_only_the_trials_that_are_left(kind, place, settings_of, whole_run, monkeypatch, caplog):
    expected, settings = whole_run("LoRA", *SEARCHED), settings_of("LoRA", *SEARCHED)
    caplog.set_level("INFO", "fwlora")
    with lasting_trackers(monkeypatch) as trackers:
        interrupt(settings, monkeypatch, place, kind)
        caplog.clear()
        run_training(settings)
        assert find_results(settings, trackers[settings.run.run_id]) == expected
    kept = sum("was made before" in line for line in caplog.messages)
    assert kept == (place[1] - 1 if place[0] == "trial" else 3)


def test_many_ends_one_after_the_other(settings_of, whole_run, monkeypatch):
    expected, settings = whole_run("FW-LoRA, sketch"), settings_of("FW-LoRA, sketch")
    ends: list[tuple[str, Place]] = [
        ("kill", ("step", 2)), ("stop", ("step", 4)), ("kill", ("step", 6)), ("stop", ("evaluation", 1)),
        ("stop", ("step", 12)), ("kill", ("step", 19)), ("kill", ("summary", 0)), ("kill", ("save", 0)),
    ]  # fmt: skip
    with lasting_trackers(monkeypatch) as trackers:
        for kind, place in ends:
            interrupt(settings, monkeypatch, place, kind)
        run_training(settings)
        assert find_results(settings, trackers[settings.run.run_id]) == expected


def test_a_damaged_checkpoint_gives_way_to_the_one_before(settings_of, whole_run, monkeypatch, caplog):
    expected, settings = whole_run("AdaLoRA"), settings_of("AdaLoRA")
    with lasting_trackers(monkeypatch) as trackers:
        interrupt(settings, monkeypatch, ("step", 17), "stop")
        store = CheckpointStore(Path("results") / settings.run.run_id / "checkpoint")
        newest, before = store.read_newest()
        assert (newest.step, before.step) == (17, 10)
        (newest.folder / "state-0.safetensors").write_bytes(b"damage")
        run_training(settings)
        assert "is damaged (state-0.safetensors is not what was written)" in caplog.text
        assert find_results(settings, trackers[settings.run.run_id]) == expected


def test_a_checkpoint_of_another_seed_gives_other_bytes(settings_of, whole_run, monkeypatch):
    """The negative control: what is compared would show a wrong state."""
    expected, settings = whole_run("LoRA"), settings_of("LoRA")
    other = settings_of("LoRA", "run.training.seed=7").model_copy(update={"results_dir": "other"})
    checkpoints = []
    with lasting_trackers(monkeypatch) as trackers:
        for each in (other, settings):
            trackers.clear()
            interrupt(each, monkeypatch, ("step", 17), "stop")
            folder = Path(each.results_dir) / each.run.run_id / "checkpoint"
            checkpoints.append(next(CheckpointStore(folder).read_newest()).folder)
        for name in ("state-0.json", "state-0.safetensors", "rows.jsonl"):
            (checkpoints[1] / name).write_bytes((checkpoints[0] / name).read_bytes())
        note = checkpoints[1] / "checkpoint.json"
        digests = {name: digest for name, digest in digest_folder(checkpoints[1]).items() if name != note.name}
        note.write_text(json.dumps({**json.loads(note.read_text()), "files": digests}))
        run_training(settings)
        found = find_results(settings, trackers[settings.run.run_id])
    weights = "adapter_model.safetensors"
    assert found["adapter"][weights] != expected["adapter"][weights]
    assert found["rows"] != expected["rows"] and found["summary"] != expected["summary"]


def test_other_settings_are_refused_with_every_difference_until_one_starts_anew(settings_of, whole_run, monkeypatch):
    settings = settings_of("LoRA")
    changed = settings_of("LoRA", "run.training.learning_rate=0.5", "run.training.epochs=2")
    anew = settings_of("LoRA", "run.training.learning_rate=0.5", "run.training.epochs=2", "resume=never")
    with lasting_trackers(monkeypatch) as trackers:
        interrupt(settings, monkeypatch, ("step", 17), "stop")
        with pytest.raises(UserError) as refused:
            run_training(changed)
        message = str(refused.value)
        assert "has a checkpoint, and differs from what is asked for (3 problems)" in message
        assert "run.training.epochs: 3 then, 2 now" in message and "resume=never" in message
        assert "run.training.learning_rate: " in message and "then, 0.5 now" in message
        run_training(anew)
        tracker = trackers[settings.run.run_id]
        assert tracker.config["attempt"]["chain"] == [] and tracker.config["run"]["training"]["epochs"] == 2
        assert [row["global_step"] for row in tracker.rows if "train_loss" in row] == list(range(1, 21))
        with pytest.raises(UserError, match="is finished, and differs"):
            run_training(settings)


def test_a_checkpoint_without_a_record_or_of_a_search_with_another_outcome_is_refused(settings_of, monkeypatch):
    settings = settings_of("LoRA", *SEARCHED)
    directory = Path("results") / settings.run.run_id
    with lasting_trackers(monkeypatch):
        interrupt(settings, monkeypatch, ("step", 17), "stop")
        trials = directory / "checkpoint" / "trials.txt"
        monkeypatch.setattr(
            "src.train.search", lambda run, objective, log: SearchResult({"learning_rate": 0.0123}, 0.5, 3, 0)
        )
        with pytest.raises(UserError, match="is of a training of other settings"):
            run_training(settings)
        (record,) = sorted((directory / "attempts").glob("*1.json"))
        (directory / "attempts" / "000002.json").unlink()
        record.write_text("[")
        with pytest.raises(UserError, match=r"holds a checkpoint, but no record in .* says of which attempt"):
            run_training(settings)
        assert trials.exists()


def test_a_finished_run_is_left_as_it_is(settings_of, monkeypatch, caplog):
    settings = settings_of("LoRA")
    caplog.set_level("INFO", "fwlora")
    with lasting_trackers(monkeypatch) as trackers:
        run_training(settings)
        directory = Path("results") / settings.run.run_id
        before, rows = digest_folder(directory / "adapter"), list(trackers[settings.run.run_id].rows)
        caplog.clear()
        run_training(settings)
        assert f"run {settings.run.run_id} is finished" in caplog.text
        assert digest_folder(directory / "adapter") == before and trackers[settings.run.run_id].rows == rows
        assert len(list((directory / "attempts").glob("*.json"))) == 1


def test_changed_data_or_weights_are_refused(settings_of, tiny_roberta, monkeypatch, tmp_path):
    shutil.copytree(tiny_roberta, tmp_path / "model")
    settings = settings_of("LoRA")
    model = settings.run.model.model_copy(update={"pretrained_id": str(tmp_path / "model")})
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"model": model})})
    dataset = settings.run.dataset.model_copy(update={"train_examples": 290})
    fewer = settings.model_copy(update={"run": settings.run.model_copy(update={"dataset": dataset})})
    with lasting_trackers(monkeypatch):
        interrupt(settings, monkeypatch, ("step", 17), "stop")
        with pytest.raises(UserError) as refused:
            run_training(fewer)
        assert "data.train: " in str(refused.value) and "data.train_examples: 300 then, 290 now" in str(refused.value)
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["embeddings.word_embeddings.weight"][5] += 1
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"weights\.model\.safetensors: '\w+' then, '\w+' now"):
            run_training(settings)
