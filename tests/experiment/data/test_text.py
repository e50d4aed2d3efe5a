"""Splits as text: fingerprints, fixed subsets, the held-out part."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fwlora.experiment.data.text import TaskData, draw_subset, make_split, split_heldout
from fwlora.experiment.errors import UserError


def test_subsets_are_fixed_and_keep_their_order(tmp_path):
    labels = np.arange(100) % 2
    split = make_split(([f"t{i}" for i in range(100)],), labels)
    part = draw_subset(split, 30, 0)
    order = [int(text[1:]) for text in part.texts[0]]
    assert order == sorted(order) and len(order) == 30 and part.labels.tolist() == [i % 2 for i in order]
    assert draw_subset(split, 30, 0).fingerprint == part.fingerprint != draw_subset(split, 30, 1).fingerprint
    assert draw_subset(split, None, 0) is split and draw_subset(split, 100, 0) is split


def test_heldout_part_is_stratified_fixed_and_disjoint():
    labels = np.array([0] * 300 + [1] * 700)
    split = make_split(([f"t{i}" for i in range(1000)],), labels)
    rest, heldout = split_heldout(split, 0.1, 3)
    assert heldout.labels.tolist().count(0) == 30 and len(heldout.labels) == 100
    assert set(rest.texts[0]).isdisjoint(heldout.texts[0]) and len(rest.labels) == 900
    assert split_heldout(split, 0.1, 3)[1].fingerprint == heldout.fingerprint
    with pytest.raises(UserError, match=r"heldout_fraction = 0\.1 of 2 training examples"):
        split_heldout(make_split((["a", "b"],), np.array([0, 1])), 0.1, 0)


def test_fingerprint_is_of_texts_and_labels_in_order():
    base = make_split((["a", "b"],), np.array([0, 1])).fingerprint
    assert base == hashlib.sha256(b"('a', 0)('b', 1)").hexdigest()[:16]
    others = [(["b", "a"], [0, 1]), (["a", "b"], [1, 1]), (["a", "c"], [0, 1])]
    assert all(make_split((texts,), np.array(labels)).fingerprint != base for texts, labels in others)


def test_limits_apply_to_each_split_by_itself():
    split = make_split(([f"t{i}" for i in range(10)],), np.arange(10) % 2)
    data = TaskData("x", ("0", "1"), "accuracy", split, split).limit(4, None, 0)
    assert (len(data.train.labels), len(data.evaluation.labels)) == (4, 10)
    assert data.train.fingerprint == draw_subset(split, 4, 0).fingerprint
