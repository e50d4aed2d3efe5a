from __future__ import annotations

import numpy as np
import pytest

from fwlora.experiment.batching import TokenizedSplit, collate, plan_epoch, plan_evaluation


def make_split(lengths: list[int], segments: bool = False) -> TokenizedSplit:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    kinds = (tokens % 2).astype(np.int8) if segments else None
    return TokenizedSplit(tokens, kinds, offsets, np.arange(len(lengths), dtype=np.int64) % 2)


LENGTHS = np.random.default_rng(0).integers(3, 60, size=1003)


@pytest.mark.parametrize("by_length", [True, False])
def test_every_example_once_per_epoch_and_fresh_each_epoch(by_length):
    plans = [plan_epoch(LENGTHS, 32, seed=4, epoch=epoch, by_length=by_length) for epoch in (0, 1)]
    for plan in plans:
        assert sorted(np.concatenate(plan)) == list(range(1003))
        assert sorted(len(batch) for batch in plan) == [11] + [32] * 31
    assert not np.array_equal(np.concatenate(plans[0]), np.concatenate(plans[1]))


def test_order_is_decided_by_seed_and_epoch_alone():
    first = plan_epoch(LENGTHS, 32, seed=4, epoch=1, by_length=True)
    np.random.default_rng(9).random(10)
    again = plan_epoch(LENGTHS, 32, seed=4, epoch=1, by_length=True)
    other = plan_epoch(LENGTHS, 32, seed=5, epoch=1, by_length=True)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def padding_share(plan: list[np.ndarray]) -> float:
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in plan)
    return 1 - LENGTHS.sum() / padded


def test_like_lengths_leave_little_padding_and_batches_come_in_random_order():
    plan = plan_epoch(LENGTHS, 32, seed=0, epoch=0, by_length=True)
    assert padding_share(plan) < 0.06 < 0.4 < padding_share(plan_epoch(LENGTHS, 32, seed=0, epoch=0, by_length=False))
    means = np.array([LENGTHS[batch].mean() for batch in plan])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_evaluation_sees_every_example_once_in_order_of_length():
    plan = plan_evaluation(LENGTHS, 64)
    order = np.concatenate(plan)
    assert sorted(order) == list(range(1003)) and np.all(np.diff(LENGTHS[order]) >= 0)


def test_collate_pads_to_the_longest_or_to_a_width():
    split = make_split([2, 3, 1], segments=True)
    inputs, labels = collate(split, np.array([2, 0]), pad_token_id=99)
    assert inputs["input_ids"].tolist() == [[6, 99], [1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0], [1, 0]]
    assert labels.tolist() == [0, 0]
    left, _ = collate(split, np.array([2, 0]), pad_token_id=99, pad_left=True)
    assert left["input_ids"].tolist() == [[99, 6], [1, 2]] and left["attention_mask"].tolist() == [[0, 1], [1, 1]]
    wide, _ = collate(split, np.array([1]), pad_token_id=99, width=5)
    assert wide["input_ids"].tolist() == [[3, 4, 5, 99, 99]]


def test_select_keeps_examples_whole():
    split = make_split([2, 3, 1], segments=True).select(np.array([2, 0]))
    assert split.tokens.tolist() == [6, 1, 2] and split.offsets.tolist() == [0, 1, 3]
    assert split.segments.tolist() == [0, 1, 0] and split.labels.tolist() == [0, 0] and len(split) == 2
