"""FisherWeightedLora as a loop holds it: phases, equality with the loss term, resume, reallocation, mistakes."""

from __future__ import annotations

import copy
import gc
import io
import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from small_models import Block, loss_of, make_adapted, make_batches, squared_gradient_norms, trainable
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fwlora.regularizer
from fwlora import FisherWeightedLora, FisherWeighting, FwLoraConfig, reference
from fwlora.adapters import delta_norms, find_adapter_pairs
from fwlora.regularizer import UnmeasuredError

EXACT = {"estimator": "exact", "fisher_every": 1}


def attach(model: nn.Module, **options) -> FisherWeightedLora:
    return FisherWeightedLora(model, FisherWeighting(**{**EXACT, **options}))


def train(model, fw, optimizer, steps, *, start=0) -> None:
    for step in range(start, start + steps):
        loss_of(model, make_batches(step % 4 + 1)[-1]).backward()
        if fw is not None:
            fw.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def test_importance_is_frozen_at_the_step_asked_for_and_follows_the_moving_average():
    model = make_adapted()
    fw = attach(model, warmup_steps=2, decay=0.9)
    norms = []
    for batch in make_batches(2):
        assert fw.in_warmup
        norms.append(squared_gradient_norms(model, lambda m, batch=batch: loss_of(m, batch)).numpy())
        model.zero_grad()
        loss_of(model, batch).backward()
        fw.step()
    assert not fw.in_warmup
    expected = reference.importance(reference.moving_average(norms, 0.9), "sum")
    assert list(fw.importance()) == ["query", "key", "output"]
    assert list(fw.importance().values()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_every_nth_step_is_measured_from_the_first_on():
    model = make_adapted()
    fw = attach(model, warmup_steps=8, decay=0.9, fisher_every=3)
    measured, norms = [], []
    for step in range(8):
        batch = make_batches(step + 1)[-1]
        measured.append(fw.recorder.measuring)
        norms.append(squared_gradient_norms(model, lambda m, batch=batch: loss_of(m, batch)).numpy())
        model.zero_grad()
        loss_of(model, batch).backward()
        fw.step()
    assert measured == [True, False, False, True, False, False, True, False]
    expected = reference.moving_average(norms, 0.9, 3)
    torch.testing.assert_close(fw.fisher.values, torch.from_numpy(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_warmup_leaves_gradients_alone_and_no_hook_outlives_it(estimator):
    model, (first,) = make_adapted(), make_batches(1)
    plain = copy.deepcopy(model)
    loss_of(plain, first).backward()
    fw = attach(model, strength=10.0, warmup_steps=1, estimator=estimator)
    loss_of(model, first).backward()
    fw.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("importance", ["sum", "max", "mean", "none"])
def test_step_equals_adding_the_term_to_the_loss(importance):
    model = make_adapted({"key": 3})
    first, second = make_batches(2)
    fw = attach(model, strength=0.7, warmup_steps=1, importance=importance)
    loss_of(model, first).backward()
    fw.step()
    model.zero_grad()
    # The literal loss: lambda sum (1 - I) ||s B A||^2 with the update formed in full.
    penalty = 0.7 * sum(
        (1 - fw.importance()[pair.name]) * (pair.scaling * pair.B @ pair.A).square().sum() for pair in fw.pairs
    )
    (loss_of(model, second) + penalty).backward()
    twin_gradients = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    loss_of(model, second).backward()
    fw.step()
    for got, expected in zip((p.grad for p in trainable(model)), twin_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fw.last_penalty, penalty.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(fw.penalty(), penalty, rtol=1e-12, atol=0)


def test_one_term_per_step_under_accumulation_loss_scaling_and_either_side_of_backward():
    gradients = []
    for scale, before in ((1.0, False), (256.0, False), (256.0, True)):
        model, data = make_adapted(), make_batches(3)
        fw = attach(model, strength=0.7, warmup_steps=1)
        (scale * loss_of(model, data[0])).backward()
        fw.step(loss_scale=scale)
        model.zero_grad()
        if before:
            fw.shrink(scale)
        for batch in data:
            (scale * loss_of(model, batch, 3)).backward()
        for parameter in trainable(model):
            parameter.grad /= scale
        if not before:
            fw.step(loss_scale=scale)
        gradients.append([p.grad for p in trainable(model)])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-12, atol=1e-14)


def test_a_gradient_scaler_changes_nothing():
    results = []
    for scale in (None, 8.0):
        model = make_adapted()
        fw = attach(model, strength=0.7, warmup_steps=3, estimator="sketch")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1, enabled=scale is not None)
        for batch in make_batches(6):
            scaler.scale(loss_of(model, batch)).backward()
            scaler.unscale_(optimizer)
            fw.step(loss_scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()  # the scale doubles at every step
            optimizer.zero_grad()
        results.append([*(p.detach() for p in trainable(model)), fw.fisher.values])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# What makes the host wait for a device: reading a value, and operations whose result's size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


@pytest.mark.parametrize("estimator", ["exact", "sketch", "adapter"])
def test_a_step_never_waits_for_the_device(estimator):
    model = make_adapted()
    fw = attach(model, warmup_steps=4, fisher_every=2, estimator=estimator, strength=0.1)
    waited = []
    for batch in make_batches(7):
        model.zero_grad()
        loss_of(model, batch).backward()
        with Operations() as seen:
            fw.step()
        waited.append(bool(WAITING & set(seen.names)))
    # The fourth step freezes: once per training, and the proof that a wait would be seen.
    assert waited == [False, False, False, True, False, False, False]


def test_the_shrinkage_step_does_not_grow_with_the_number_of_matrices():
    counts = []
    for copies in (1, 4):
        torch.manual_seed(0)
        base = nn.ModuleDict({f"layer{i}": Block() for i in range(copies)}).double()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "key"]))
        fw = FisherWeightedLora(model, FisherWeighting(warmup_steps=1, **EXACT))
        x = torch.randn(3, 5, dtype=torch.float64)
        for _ in range(2):
            sum(layer(x).square().sum() for layer in base.values()).backward()
            with Operations() as seen:
                fw.step()
        counts.append(sum(name in {"bmm", "mul", "dot", "stack"} for name in seen.names))
    assert counts[0] == counts[1]


def test_zero_strength_is_lora_bit_for_bit():
    for estimator in ("exact", "sketch", "adapter"):
        plain, weighted = make_adapted(), make_adapted()
        fw = attach(weighted, strength=0.0, warmup_steps=30, estimator=estimator, fisher_every=4)
        for model, held in ((plain, None), (weighted, fw)):
            train(model, held, torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1), 50)
        assert not fw.in_warmup and float(fw.last_penalty) == 0.0
        for p, q in zip(plain.parameters(), weighted.parameters(), strict=True):
            assert torch.equal(p, q)


def test_shrinkage_lowers_the_updates_it_is_told_to():
    ratios = []
    for importance in ("none", "max"):
        model = make_adapted()
        fw = attach(model, strength=50.0, warmup_steps=1, importance=importance)
        loss_of(model, make_batches(1)[0]).backward()
        fw.step()
        before = delta_norms(fw.pairs)
        model.zero_grad()
        fw.shrink()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 1e-4 * parameter.grad
        ratios.append(delta_norms(fw.pairs) / before)
    top = list(fw.importance().values()).index(1.0)
    assert (ratios[0] < 1).all()
    assert ratios[1][top] == pytest.approx(1.0, abs=1e-12) and (ratios[1] < 1).sum() == 2


def test_gradients_that_are_not_finite_are_skipped_counted_and_never_averaged_in():
    model, fresh = make_adapted(), make_adapted()
    good, bad = make_batches(2)
    bad = (bad[0], torch.full_like(bad[1], float("nan")))
    for target, data in ((model, [good, bad, good]), (fresh, [good, good])):
        fw = attach(target, warmup_steps=len(data), decay=0.5)
        for batch in data:
            target.zero_grad()
            loss_of(target, batch).backward()
            fw.step()
        if target is model:
            skipped, values = fw.skipped_steps(), fw.fisher.values
    assert skipped == 1 and fw.skipped_steps() == 0
    torch.testing.assert_close(values, fw.fisher.values, rtol=1e-12, atol=0)


def test_a_warmup_without_any_finite_gradient_is_an_error():
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, warmup_steps=2)
    for _ in range(2):
        loss_of(model, (batch[0], batch[1] * float("inf"))).backward()
        if fw.steps == 1:
            with pytest.raises(UnmeasuredError, match="none of 2 measured steps had finite gradients; lower"):
                fw.step()
        else:
            fw.step()


def test_one_adapter_of_several_is_measured_and_shrunk():
    model = make_adapted()
    other = LoraConfig(r=1, lora_alpha=1, target_modules=["query", "output"])
    model.add_adapter("second", other)
    model.set_adapter("second")
    model.double()
    with torch.no_grad():
        for pair in find_adapter_pairs(model, "second"):
            pair.B.normal_()
    fw = attach(model, strength=0.5, warmup_steps=1)
    assert [pair.name for pair in fw.pairs] == ["query", "output"]
    (batch,) = make_batches(1)
    expected = squared_gradient_norms(model, lambda m: loss_of(m, batch), "second")
    loss_of(model, batch).backward()
    fw.step()
    torch.testing.assert_close(fw.fisher.values, 0.02 * expected, rtol=1e-12, atol=0)
    fw.step()
    assert all(pair.B.grad is None for pair in find_adapter_pairs(model, "default"))
    # The first adapter may be held beside it: another adapter is another set of matrices.
    with pytest.raises(ValueError, match=r"'default' of `model` is frozen; .* activate it with model\.set_adapter"):
        FisherWeightedLora(model, adapter_name="default")
    model.set_adapter("default")
    assert len(FisherWeightedLora(model).pairs) == 3


def test_backward_passes_of_another_adapter_are_not_measured():
    model, data = make_adapted(), make_batches(2)
    expected = squared_gradient_norms(model, lambda m: loss_of(m, data[0]))
    model.add_adapter("second", LoraConfig(r=1, target_modules=["query", "key"]))
    fw = attach(model.double(), decay=0.0)
    model.set_adapter("second")
    loss_of(model, data[1]).backward()
    model.set_adapter("default")
    loss_of(model, data[0]).backward()
    fw.step()
    torch.testing.assert_close(fw.fisher.values, expected, rtol=1e-12, atol=0)


def test_a_model_inside_another_module_keeps_its_configuration():
    model = get_peft_model(Block(), FwLoraConfig(r=2, target_modules=["query"], warmup_steps=7))
    fw = FisherWeightedLora(nn.ModuleDict({"net": model}))
    assert fw.options.warmup_steps == 7 and [pair.name for pair in fw.pairs] == ["query"]


def test_adapters_in_half_precision_are_shrunk_in_float32():
    model = make_adapted().bfloat16()
    fw = attach(model, warmup_steps=1, strength=0.5)
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        plain = [pair.B.grad.clone() for pair in fw.pairs]
        fw.step()
    exact = [
        reference.penalty_gradients(
            pair.A.detach().double().numpy(), pair.B.detach().double().numpy(), pair.scaling, importance, 0.5
        )[1]
        for pair, importance in zip(fw.pairs, fw.importance().values(), strict=True)
    ]
    for pair, before, gradient in zip(fw.pairs, plain, exact, strict=True):
        expected = (before.double() + torch.from_numpy(gradient)).bfloat16()
        torch.testing.assert_close(pair.B.grad, expected, rtol=0.01, atol=1e-4)
    assert fw.last_penalty.dtype == torch.float32


def test_activating_both_adapters_leaves_the_choice_to_the_user():
    model = make_adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"`adapter_name` is not given and 2 adapters are active \['default', 'sec"):
        FisherWeightedLora(model)


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
        # The rule for the optimiser: state goes where the shape does, and stays otherwise.
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


def test_reallocation_checks_its_optimiser_and_its_processes(monkeypatch):
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, allocation="reallocate", warmup_steps=100)
    loss_of(model, batch).backward()
    half = torch.optim.SGD([pair.A for pair in fw.pairs], lr=0.1)
    for wrong, kind in ((half, "SGD"), ("adam", "str")):
        with pytest.raises(ValueError, match=rf"`optimizer` \({kind}\) does not hold both factors of 3 matrices"):
            fw.step(wrong)
    fw.close()
    monkeypatch.setattr(fwlora.regularizer, "_process_count", lambda: 2)
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


def test_one_holder_per_adapter_until_it_lets_go():
    model = make_adapted()
    fw = attach(model)
    with pytest.raises(ValueError, match="adapter 'default' of `model` already has a FisherWeightedLora"):
        attach(model)
    fw.close()
    for call in (fw.step, fw.shrink, lambda: fw.load_state_dict({})):
        with pytest.raises(RuntimeError, match="was called after close"):
            call()
    second = attach(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 3
    del second
    gc.collect()
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert attach(model).in_warmup


def test_mistakes_are_named():
    model = make_adapted()
    fw = attach(model, warmup_steps=2)
    with pytest.raises(RuntimeError, match=r"`step` was called before any backward pass.* between loss\.backward"):
        fw.step()
    with pytest.raises(RuntimeError, match="frozen after 2 steps; 0 are done"):
        fw.importance()
    with pytest.raises(RuntimeError, match="no importances before step 2; call `step`"):
        fw.shrink()
    with pytest.raises(ValueError, match=r"`model` \(Block\) has no adapter; wrap it with peft.get_peft_model"):
        FisherWeightedLora(Block())
    with pytest.raises(ValueError, match="no adapter named 'mine'; it has 'default'"):
        FisherWeightedLora(model, adapter_name="mine")
    for (batch,) in [make_batches(1)] * 2:
        model.zero_grad()
        loss_of(model, batch).backward()
        fw.step()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no adapter has a gradient; call it once between"):
        fw.step()


def test_unmeasured_steps_need_a_backward_pass_too():
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, warmup_steps=9, fisher_every=4)
    loss_of(model, batch).backward()
    fw.step()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="before any backward pass"):
        fw.step()


def test_adapters_that_cannot_be_weighted_are_refused():
    embedding = get_peft_model(
        nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"])
    )
    with pytest.raises(ValueError, match="an embedding"):
        FisherWeightedLora(embedding)
    attention = get_peft_model(
        nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), LoraConfig(target_modules=["attn"])
    )
    with pytest.raises(ValueError, match="fused attention"):
        FisherWeightedLora(attention)
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        FisherWeightedLora(nn.DataParallel(make_adapted()))
    with pytest.raises(ValueError, match="`options` is a dict; give a FisherWeighting"):
        FisherWeightedLora(make_adapted(), {"strength": 1})
    frozen = make_adapted()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="'default' of `model` is frozen; load it with is_trainable=True, or"):
        FisherWeightedLora(frozen)
    dora = get_peft_model(Block(), LoraConfig(target_modules=["query"], use_dora=True))
    with pytest.raises(ValueError, match=r"1 matrices of `model`, the first 'query', carry a variant of LoRA \(DoRA"):
        FisherWeightedLora(dora)
    adalora = get_peft_model(Block(), AdaLoraConfig(target_modules=["query"], total_step=10))
    with pytest.raises(ValueError, match="'default' of `model` is an AdaLoRA adapter"):
        FisherWeightedLora(adalora)
    convolution = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="carry a variant of LoRA"):
        FisherWeightedLora(convolution)


def test_reallocation_needs_the_optimiser_from_the_first_step_on():
    model, (batch,) = make_adapted(), make_batches(1)
    fw = attach(model, allocation="reallocate", warmup_steps=100)
    loss_of(model, batch).backward()
    with pytest.raises(ValueError, match="`optimizer` is missing: with allocation='reallocate' call step"):
        fw.step()


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
