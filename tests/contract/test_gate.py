"""What a refactoring must not change: trainings in float64, and the documents that evaluation makes."""

from __future__ import annotations

import copy
import json

import pytest

from tests.gate import evaluation_case, training_cases
from tests.gate.differences import find_differences
from tests.helpers.paths import REPOSITORY

EXPECTED = REPOSITORY / "tests" / "gate" / "expected"
TOLERANCE = 1e-9


def read_expected(name: str) -> dict:
    return json.loads((EXPECTED / name).read_text())


@pytest.fixture(scope="module")
def trainings() -> dict:
    return json.loads(json.dumps(training_cases.run_cases()))


def test_trainings_take_the_recorded_steps(trainings):
    assert list(find_differences(read_expected("training.json"), trainings, TOLERANCE)) == []


def test_every_method_importance_and_estimator_is_recorded():
    expected = read_expected("training.json")
    assert len(expected) == 18 and all(len(case["train_loss"]) == training_cases.STEPS for case in expected.values())
    # A case that does not differ from plain LoRA's would say nothing of its method.
    sequences = [tuple(case["gradient_norm"]) for case in expected.values()]
    distinct = {sequence for sequence in sequences}
    # Uniform shrinkage does not depend on what was measured, so its three estimators agree.
    assert len(distinct) == len(sequences) - 2


def test_evaluation_makes_the_recorded_files():
    assert list(find_differences(read_expected("evaluation.json"), evaluation_case.evaluate(), TOLERANCE)) == []


def test_a_difference_is_found():
    expected = read_expected("training.json")
    changed = copy.deepcopy(expected)
    changed["lora"]["train_loss"][3] += 1e-8
    del changed["adalora"]["penalty"]
    lines = list(find_differences(expected, changed, TOLERANCE))
    assert len(lines) == 2 and lines[0].startswith("/lora/train_loss[3]: ") and lines[1] == "/adalora/penalty: missing"
    document = {"a.json": '{"x": 1.0}'}
    assert list(find_differences(document, {"a.json": '{"x":  1.0}'})) == ["/a.json: equal values in other bytes"]
    assert list(find_differences(document, {"a.json": '{"x": 1.5}'})) == ["/a.json/x: 1.0 became 1.5"]
