"""Continuing from a saved state, exactly; states that do not fit."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from fwlora import FisherWeightedLora
from tests.helpers.small_models import (
    attach,
    make_adapted,
    train,
    trainable,
)


def run_of(steps: int, stop: int | None, hidden: int = 4, **options) -> tuple[nn.Module, FisherWeightedLora]:
    """Trains; with ``stop``, everything is saved there and carried on by fresh objects."""
    model = make_adapted(hidden=hidden)
    fw = attach(model, **options)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    if stop is None:
        train(model, fw, optimizer, steps)
        return model, fw
    train(model, fw, optimizer, stop)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "fw": fw.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    as_json = json.loads(json.dumps(fw.state_dict()))
    assert as_json == fw.state_dict()
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    model = make_adapted(seed=1, hidden=hidden)
    fw = attach(model, **options)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    fw.load_state_dict(as_json)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, fw, optimizer, steps - stop, start=stop)
    return model, fw


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
@pytest.mark.parametrize("stop", [1, 3, 4, 9, 10, 13])
def test_resume_is_exact(estimator, stop):
    options = {"warmup_steps": 10, "strength": 0.1, "estimator": estimator, "fisher_every": 3, "sketch_size": 2}
    through, fw = run_of(16, None, **options)
    resumed, fw_resumed = run_of(16, stop, **options)
    for p, q in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert fw.importance() == fw_resumed.importance() and fw.steps == fw_resumed.steps == 16


@pytest.mark.parametrize("stop", [4, 5, 8])
def test_resume_is_exact_with_reallocated_ranks(stop):
    options = {"warmup_steps": 5, "strength": 0.1, "allocation": "reallocate", "max_rank_factor": 3.0, "hidden": 9}
    through, fw = run_of(12, None, **options)
    resumed, fw_resumed = run_of(12, stop, **options)
    assert [pair.rank for pair in fw.pairs] == [pair.rank for pair in fw_resumed.pairs] != [2, 2, 2]
    for p, q in zip(fw.pairs, fw_resumed.pairs, strict=True):
        assert torch.equal(p.A, q.A) and torch.equal(p.B, q.B)
    for p, q in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_states_of_others_are_refused():
    fw = attach(make_adapted())
    state = fw.state_dict()
    other = attach(make_adapted(targets=("query", "output")))
    with pytest.raises(ValueError, match="`state` belongs to another model: it has 'key' as well; load it into"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="it has no matrix 'key'"):
        fw.load_state_dict(other.state_dict())
    wider = attach(make_adapted({"key": 3}))
    with pytest.raises(ValueError, match="'key' has rank 2 there and 3 here"):
        wider.load_state_dict(state)
    with pytest.raises(ValueError, match=r"'key' has shape \(9, 5\) there and \(4, 5\) here"):
        fw.load_state_dict({**state, "shapes": [[4, 5], [9, 5], [3, 4]]})
    with pytest.raises(ValueError, match=r"other options: warmup_steps 500 instead of 7, decay 0\.98 instead of 0\.5"):
        attach(make_adapted(), warmup_steps=7, decay=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"not a state of FisherWeightedLora in format 1 \(found: 7\)"):
        fw.load_state_dict({**state, "format": 7})
    with pytest.raises(ValueError, match=r"format 1 \(found: a list\)"):
        fw.load_state_dict([])
    for damage, told in (
        ({"steps": 2.5}, "steps is 2.5"), ({"fisher": [1.0]}, r"fisher is \[1.0\]"), ({"ranks": [0, 0, 0]}, "all 0"),
        ({"importance": [0.5] * 3}, "importance is there after 0 steps"), ({"steps": 900}, "missing after 900 steps"),
        ({"names": "abc"}, "names is no list"), ({"options": None}, "options is no mapping"),
        ({"fisher": [float("nan")] * 3}, "fisher is"), ({"shapes": [None] * 3}, "shapes is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`state` is damaged: .*{told}"):
            fw.load_state_dict({**state, **damage})
    assert fw.state_dict() == state
    missing = {name: value for name, value in state.items() if name != "importance"}
    with pytest.raises(ValueError, match="`state` is damaged: importance missing"):
        fw.load_state_dict(missing)
    counted = {**state, "steps": 4, "measured": 3, "skipped": 1}
    fw.load_state_dict(counted)
    assert fw.state_dict() == counted and fw.skipped_steps() == 1
    changed = attach(make_adapted(), strength=0.5)
    changed.load_state_dict(state)
    assert changed.options.strength == 0.5
