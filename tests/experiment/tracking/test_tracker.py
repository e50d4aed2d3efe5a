"""Trackers that need no service: what they accept, and what they keep."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from fwlora.experiment.tracking.records import RunRecord, canonicalize
from fwlora.experiment.tracking.tracker import (
    NullTracker,
    Tracker,
    check_entries,
    restore_non_finite,
    spell_non_finite,
)
from tests.helpers.memory_tracker import MemoryTracker


@pytest.fixture(params=[NullTracker, MemoryTracker])
def tracker(request: pytest.FixtureRequest) -> Tracker:
    return request.param()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"global_step": 1, "train_loss": np.float32(0.5)}, r"`train_loss` is a float32; convert it with float\(\)"),
        ({"global_step": 1, "train_loss": "0.5"}, "`train_loss` is a str"),
        ({"global_step": 1, "train_loss": None}, "`train_loss` is a NoneType"),
        ({"global_step": 1, "train.loss": 0.5}, "'train.loss' cannot name a metric"),
        ({"global_step": 1, "_step": 1}, "'_step' cannot name a metric"),
        ({"global_step": 1, 7: 1.0}, "7 cannot name a metric"),
        ({"train_loss": 0.5}, r"without `global_step` is lost on reading; got \['train_loss'\]"),
    ],
)
def test_rows_that_could_not_be_recorded_are_refused(tracker: Tracker, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracker.log(row)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"b": [1, {2}]}}, r"`a\.b\[1\]` is a set"),
        ({"a": {"b": {3: "x"}}}, r"`a\.b` has the key 3"),
        ({"a": np.zeros(2)}, "`a` is a ndarray"),
        ({"": 1}, "'' cannot name a metric"),
    ],
)
def test_entries_that_could_not_be_recorded_are_refused(tracker: Tracker, entries: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracker.update_config(entries)
    with pytest.raises(ValueError, match=message):
        tracker.set_summary(entries)


def test_null_tracker_accepts_what_a_run_logs() -> None:
    tracker = NullTracker()
    tracker.log({"global_step": 1, "train_loss": math.nan, "fisher_warmup": True})
    tracker.update_config({"run": {"training": {"seed": 1, "betas": (0.9, 0.999)}}})
    tracker.set_summary({"module_importances": [None, 0.5], "completed": True})
    tracker.finish()


def test_memory_tracker_gives_the_record_of_the_run() -> None:
    tracker = MemoryTracker()
    tracker.update_config({"run": {"seed": 1}, "resolved": 0})
    tracker.update_config({"resolved": {"betas": (0.9, 0.999)}})
    for step in (1, 2, 3):
        tracker.log({"global_step": step, "train_loss": 1.0 / step})
    tracker.log({"global_step": 3, "eval_loss": 0.25})
    tracker.log({"global_step": 2, "train_loss": 0.75})
    tracker.set_summary({"final_accuracy": 0.5})
    assert not tracker.record("a").finished
    tracker.finish(exit_code=1)
    assert not tracker.record("a").finished
    tracker.finish()
    assert tracker.record("a") == RunRecord(
        run_id="a",
        config={"run": {"seed": 1}, "resolved": {"betas": [0.9, 0.999]}},
        summary={"final_accuracy": 0.5},
        history=[{"global_step": 1, "train_loss": 1.0}, {"global_step": 2, "train_loss": 0.75}],
        state="finished",
        source="memory",
    )


def test_record_spells_equal_values_equally() -> None:
    tracker = MemoryTracker()
    tracker.update_config({"run": {"lr": 1.0, "betas": (0.9, 2.0), "space": {}, "a": {"b": {}}}, "none": None})
    tracker.log({"train_loss": -0.0, "global_step": 1.0, "fisher_warmup": True})
    tracker.set_summary({"z": 2**60, "a": 1e300, "gone": None, "kept": [None, {}, math.inf]})
    record = tracker.record("a")
    assert json.dumps(record.config) == '{"none": null, "run": {"betas": [0.9, 2], "lr": 1}}'
    assert json.dumps(record.history) == '[{"fisher_warmup": true, "global_step": 1, "train_loss": 0}]'
    assert json.dumps(record.summary) == '{"a": 1e+300, "kept": [null, {}, Infinity], "z": 1.152921504606847e+18}'
    whole = {"a": 2**53, "b": -(2.0**53), "c": 2**53 + 2, "d": 0.5, "e": "1.0"}
    spelled = canonicalize(whole)
    assert spelled == whole and [type(value) for value in spelled.values()] == [int, int, float, float, str]


def test_what_was_logged_does_not_change_with_the_callers_objects() -> None:
    tracker, row, config = MemoryTracker(), {"global_step": 1}, {"run": {"ranks": [1]}}
    tracker.log(row)
    tracker.update_config(config)
    row["global_step"] = 2
    config["run"]["ranks"].append(2)
    assert tracker.rows == [{"global_step": 1}]
    assert tracker.config == {"run": {"ranks": [1]}}


def test_non_finite_numbers_survive_being_spelled() -> None:
    entries = check_entries({"a": [math.nan, {"b": -math.inf}], "c": math.inf, "d": "nan", "e": 1})
    spelled = spell_non_finite(entries)
    assert spelled == {"a": ["NaN", {"b": "-Infinity"}], "c": "Infinity", "d": "nan", "e": 1}
    restored = restore_non_finite(spelled)
    assert math.isnan(restored["a"][0])
    assert (restored["a"][1]["b"], restored["c"], restored["d"], restored["e"]) == (-math.inf, math.inf, "nan", 1)


def test_the_harness_imports_wandb_only_where_it_is_used() -> None:
    code = (
        "import sys, fwlora.experiment.tracking.tracker, fwlora.experiment.tracking.wandb;"
        "print(*[name for name in sys.modules if name.split('.')[0] == 'wandb'])"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert imported == []
