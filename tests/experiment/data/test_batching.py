from __future__ import annotations

import numpy as np
import pytest
import torch

from fwlora.experiment.data.batching import (
    BATCHES_PER_POOL,
    Batch,
    Padding,
    TokenizedSplit,
    collate,
    plan_epoch,
    plan_evaluation,
    stage,
)


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

    def one(indices: list[int], **padding) -> Batch:
        return collate(split, [np.array(indices)], Padding(99, **padding), torch.device("cpu"))[0]

    batch = one([2, 0])
    assert batch.input_ids.tolist() == [[6, 99], [1, 2]] and batch.labels.tolist() == [0, 0]
    assert batch.attention_mask.tolist() == [[1, 0], [1, 1]] and batch.token_type_ids.tolist() == [[0, 0], [1, 0]]
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "token_type_ids"} and len(batch) == 2
    left = one([2, 0], left=True)
    assert left.input_ids.tolist() == [[99, 6], [1, 2]] and left.attention_mask.tolist() == [[0, 1], [1, 1]]
    assert one([1], width=5).input_ids.tolist() == [[3, 4, 5, 99, 99]]
    assert one([1, 2], multiple=4).input_ids.tolist() == [[3, 4, 5, 99], [6, 99, 99, 99]]
    capped = one([1, 2], multiple=4, max_width=3)
    assert capped.input_ids.shape == (2, 3) and one([2], multiple=2, max_width=2).input_ids.shape == (1, 2)
    assert one([1]).attention_mask is None and "attention_mask" not in one([1]).inputs()


def test_batches_made_together_are_those_made_alone():
    split = make_split([2, 3, 1, 7, 7, 4], segments=True)
    plan = [np.array([5, 0]), np.array([3, 4]), np.array([2]), np.array([1, 3, 0])]
    for padding in (Padding(0), Padding(0, left=True), Padding(0, width=9), Padding(0, multiple=4)):
        together = collate(split, plan, padding, torch.device("cpu"))
        alone = [collate(split, [indices], padding, torch.device("cpu"))[0] for indices in plan]
        for got, expected in zip(together, alone, strict=True):
            assert set(got.inputs()) == set(expected.inputs())
            for name, value in got.inputs().items():
                torch.testing.assert_close(value, expected.inputs()[name])
            torch.testing.assert_close(got.labels, expected.labels)
    assert [batch.input_ids.shape[1] for batch in collate(split, plan, Padding(0), torch.device("cpu"))] == [4, 7, 1, 7]


def test_staging_keeps_the_order_and_loses_nothing():
    split = make_split([3] * 1003)
    plan = plan_epoch(split.lengths, 8, seed=0, epoch=0, by_length=True)
    assert len(plan) > 2 * BATCHES_PER_POOL
    staged = list(stage(split, plan, Padding(0), torch.device("cpu")))
    expected = [[int(split.tokens[split.offsets[i]]) for i in indices] for indices in plan]
    assert [batch.input_ids[:, 0].tolist() for batch in staged] == expected


def test_select_keeps_examples_whole():
    split = make_split([2, 3, 1], segments=True).select(np.array([2, 0]))
    assert split.tokens.tolist() == [6, 1, 2] and split.offsets.tolist() == [0, 1, 3]
    assert split.segments.tolist() == [0, 1, 0] and split.labels.tolist() == [0, 0] and len(split) == 2
