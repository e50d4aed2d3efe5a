"""Ranks redistributed when the warm-up ends: budget, directions, optimizer state, what is saved."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fwlora.checks
from fwlora import FisherWeightedLora, reference
from fwlora.adapters import find_adapter_pairs
from tests.helpers.small_models import (
    Block,
    attach,
    loss_of,
    make_adapted,
    make_batches,
    train,
    trainable,
)


def reallocated(**options) -> tuple[nn.Module, FisherWeightedLora, torch.optim.Optimizer]:
    """One step before ranks are reallocated."""
    model = make_adapted(hidden=9)
    fw = attach(model, warmup_steps=3, strength=0.1, allocation="reallocate", max_rank_factor=3.0, **options)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    train(model, fw, optimizer, 2)
    return model, fw, optimizer


def test_reallocation_follows_the_measurement_within_the_same_budget():
    model, fw, optimizer = reallocated()
    costs = [pair.A.shape[1] + pair.B.shape[0] for pair in fw.pairs]
    before = sum(pair.rank * cost for pair, cost in zip(fw.pairs, costs, strict=True))
    updates = {pair.name: pair.module.get_delta_weight("default").detach().clone() for pair in fw.pairs}
    factors = {pair.name: (pair.A.detach().numpy().copy(), pair.B.detach().numpy().copy()) for pair in fw.pairs}
    parameters = [id(p) for pair in fw.pairs for p in (pair.A, pair.B)]
    loss_of(model, make_batches(3)[-1]).backward()
    gradients = {pair.name: pair.B.grad for pair in fw.pairs}
    fw.step(optimizer)
    ranks = [pair.rank for pair in fw.pairs]
    caps = [min(6, pair.A.shape[1], pair.B.shape[0]) for pair in fw.pairs]
    assert ranks == reference.proportional_ranks(costs, fw.fisher.values.tolist(), before, caps)
    assert sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= before
    assert [id(p) for pair in fw.pairs for p in (pair.A, pair.B)] == parameters
    changed = [pair for pair in fw.pairs if pair.rank != 2]
    assert changed and any(pair.rank > 2 for pair in changed) and any(pair.rank < 2 for pair in changed)
    for pair in fw.pairs:
        if pair.rank > 2:
            torch.testing.assert_close(pair.module.get_delta_weight("default"), updates[pair.name])
        elif pair.rank:
            expected = pair.scaling * reference.best_approximation(*factors[pair.name], pair.rank)
            torch.testing.assert_close(
                pair.module.get_delta_weight("default").detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12
            )
        # The rule for the optimizer: state goes where the shape does, and stays otherwise.
        assert (pair.A in optimizer.state) == (pair not in changed) == (pair.B in optimizer.state)
        assert (pair.B.grad is None) if pair in changed else (pair.B.grad is gradients[pair.name])
    optimizer.step()
    optimizer.zero_grad()
    train(model, fw, optimizer, 4)
    assert float(fw.last_penalty) > 0
    assert set(fw.importance()) == {"query", "key", "output"}


def test_a_matrix_that_loses_its_adapter_computes_its_base_alone():
    model, fw, optimizer = reallocated()
    fw.fisher.values = torch.tensor([1e9, 1e-9, 1e9], dtype=torch.float64)
    loss_of(model, make_batches(1)[0]).backward()
    fw.step(optimizer)
    assert [pair.rank for pair in fw.pairs] == [3, 0, 3]
    dropped = fw.pairs[1]
    x = torch.randn(3, dropped.A.shape[1], dtype=torch.float64)
    assert torch.equal(dropped.module(x), dropped.module.base_layer(x))
    assert fw.norms()[dropped.name] == 0.0
    optimizer.step()
    optimizer.zero_grad()
    train(model, fw, optimizer, 2)


def test_a_loss_that_is_still_held_does_not_hinder_reallocation():
    model = make_adapted(hidden=9)
    fw = attach(model, warmup_steps=2, allocation="reallocate", max_rank_factor=3.0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    held = []
    for batch in make_batches(5):
        held.append(loss_of(model, batch))
        held[-1].backward()
        fw.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert [pair.rank for pair in fw.pairs] != [2, 2, 2]


def test_shrinkage_after_reallocation_weights_every_matrix_by_its_own_importance():
    model, fw, optimizer = reallocated()
    fw.fisher.values = torch.tensor([1e-9, 3e9, 1e9], dtype=torch.float64)
    loss_of(model, make_batches(1)[0]).backward()
    fw.step(optimizer)
    assert fw.pairs[0].rank == 0
    kept = fw.pairs[1:]
    with torch.no_grad():
        for pair in kept:
            pair.B.normal_(generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    fw.shrink()
    expected = torch.autograd.grad(fw.penalty(), [factor for pair in kept for factor in (pair.A, pair.B)])
    found = [factor.grad for pair in kept for factor in (pair.A, pair.B)]
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)


def test_rslora_keeps_its_scaling_through_reallocation_and_saving(tmp_path):
    config = LoraConfig(r=1, lora_alpha=3, use_rslora=True, target_modules=["query", "key", "output"])
    torch.manual_seed(0)
    model = get_peft_model(Block(9).double(), config)
    fw = attach(model, warmup_steps=1, allocation="reallocate", max_rank_factor=3.0, importance="none")
    fw.fisher.values = torch.tensor([1e12, 1e-9, 1e-9], dtype=torch.float64)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss_of(model, make_batches(1)[0]).backward()
    fw.step(optimizer)
    # Ranks follow F although uniform shrinkage has no importances.
    assert fw.pairs[0].rank == 2 and fw.importance() == {"query": 0.0, "key": 0.0, "output": 0.0}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Block(9).double(), tmp_path)
    assert [pair.scaling for pair in find_adapter_pairs(loaded)] == pytest.approx(
        [3.0] * len(find_adapter_pairs(loaded))
    )
    assert find_adapter_pairs(loaded)[0].module.r["default"] == 2


def test_caps_are_rounded_up_and_the_seed_decides_new_directions():
    rows = []
    for seed in (0, 0, 1):
        model = make_adapted(hidden=9)
        fw = attach(model, warmup_steps=1, allocation="reallocate", max_rank_factor=1.3, seed=seed)
        fw.fisher.values = torch.tensor([1e12, 1e-9, 1e-9], dtype=torch.float64)
        loss_of(model, make_batches(1)[0]).backward()
        fw.step(torch.optim.SGD(trainable(model), lr=0.1))
        assert fw.pairs[0].rank == 3
        rows.append(fw.pairs[0].A[2].detach())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_reallocation_checks_its_optimizer_and_its_processes(monkeypatch):
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, allocation="reallocate", warmup_steps=100)
    loss_of(model, batch).backward()
    half = torch.optim.SGD([pair.A for pair in fw.pairs], lr=0.1)
    for wrong, kind in ((half, "SGD"), ("adam", "str")):
        with pytest.raises(ValueError, match=rf"`optimizer` \({kind}\) does not hold both factors of 3 matrices"):
            fw.step(wrong)
    fw.close()
    monkeypatch.setattr(fwlora.checks, "count_processes", lambda: 2)
    with pytest.raises(ValueError, match="`allocation` is 'reallocate' with several processes"):
        attach(model, allocation="reallocate")


def test_reallocated_adapters_are_saved_and_loaded_by_peft(tmp_path):
    model, fw, optimizer = reallocated()
    train(model, fw, optimizer, 3)
    model.save_pretrained(tmp_path)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return Block(9).double()

    loaded = PeftModel.from_pretrained(base(), tmp_path)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=0)
    assert {p.name: p.rank for p in find_adapter_pairs(loaded)} == {p.name: p.rank for p in fw.pairs if p.rank}
    assert [p.scaling for p in find_adapter_pairs(loaded)] == [3.0] * len(find_adapter_pairs(loaded))
    # A model built with the new ranks continues from the state, too.
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    held = attach(again, **{k: v for k, v in vars(fw.options).items()})
    held.load_state_dict(fw.state_dict())
    kept = {pair.name for pair in held.pairs}
    assert held.importance() == {name: value for name, value in fw.importance().items() if name in kept}
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), loaded(x), rtol=1e-12, atol=0)


def test_reallocation_needs_the_optimizer_from_the_first_step_on():
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, allocation="reallocate", warmup_steps=100)
    loss_of(model, batch).backward()
    with pytest.raises(ValueError, match="`optimizer` is missing: with allocation='reallocate' call step"):
        fw.step()


def test_no_rank_grows_beyond_the_matrix():
    """All importance on one matrix of 4 x 3: its rank may not pass 3, whatever the factor."""
    model = make_adapted()
    fw = attach(model, estimator="exact", warmup_steps=1, allocation="reallocate", max_rank_factor=100.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    hidden = torch.randn(8, 4, dtype=torch.float64)
    (1e6 * model.base_model.model.output(hidden).square().sum()).backward()
    fw.step(optimizer)
    ranks = {pair.name: pair.rank for pair in fw.pairs}
    assert ranks["output"] == 3 == min(fw.pairs[2].A.shape[1], fw.pairs[2].B.shape[0])


def test_the_initial_ranks_survive_a_load():
    model, fw, optimizer = reallocated()
    train(model, fw, optimizer, 1)
    state = fw.state_dict()
    assert state["initial_ranks"] == [2, 2, 2] != state["ranks"]
    ranks = {pair.name: pair.rank for pair in fw.pairs if pair.rank}
    assert len(ranks) == 3, "the case is one in which no matrix is lost"
    again = attach(make_adapted(ranks, hidden=9), **vars(fw.options))
    again.load_state_dict(state)
    assert again.state_dict()["initial_ranks"] == [2, 2, 2]
