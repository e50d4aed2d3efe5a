"""Calibration: computed from recorded logits, which may be missing or damaged."""

from __future__ import annotations

import numpy as np
import pytest

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.runs import calibration_error, read_runs
from fwlora.experiment.evaluation.output.tables import method_rows
from fwlora.experiment.tracking.records import pack_logits
from tests.helpers import evaluation_records as records


def test_calibration_error_by_hand():
    """Two bins: 0.6 right half of the time, and 0.9 right always."""
    logits = np.log([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    labels = np.array([0, 1, 1, 1])
    assert calibration_error(labels, logits, bins=10) == pytest.approx((2 * abs(0.5 - 0.6) + 2 * abs(1.0 - 0.9)) / 4)
    assert calibration_error(np.array([0]), np.array([[1e4, -1e4]])) == 0.0


def test_calibration_error_against_another_way_of_counting():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 3)) * 2, rng.integers(0, 3, 500)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(labels, logits) == pytest.approx(expected)


def test_recorded_logits_give_a_calibration_error_and_damaged_ones_a_reason():
    record = records.make_record("a")
    count = record.summary["eval_labels"]["count"]
    logits = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float16)
    with_logits = records.change(record, summary__eval_logits=pack_logits(logits))
    (run,) = read_runs([with_logits])
    assert run.values["eval_ece"] == pytest.approx(calibration_error(run.labels, logits.astype(np.float32)))
    (older,) = read_runs([record])
    assert "eval_ece" not in older.values
    packed = pack_logits(logits)
    for damage in (
        {"count": 10**12}, {"classes": 3}, {"encoding": "x"}, {"data": packed["data"][:40]}, {"data": 5},
        {"count": None},
    ):  # fmt: skip
        with pytest.raises(UserError, match="has logits"):
            read_runs([records.change(record, summary__eval_logits={**packed, **damage})])


def test_calibration_stands_beside_accuracy():
    logits = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float16)
    record = records.change(records.make_record("a"), summary__eval_logits=pack_logits(logits))
    runs = read_runs([record, records.make_record("b", "adalora")])
    header, rows = method_rows(group_cells(runs))
    assert header[-2:] == ["NLL", "ECE"]
    with_logits, without = rows
    assert with_logits[-1] == f"{runs[0].values['eval_ece']:.4f}" and without[-1] == "-"
    assert "ECE" not in method_rows(group_cells(runs[1:]))[0]
