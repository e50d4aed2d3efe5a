"""FisherWeightedLora as a loop holds it: phases, equality with the loss term, mistakes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fwlora import FisherWeightedLora, FisherWeighting, FwLoraConfig, reference
from fwlora.adapters import delta_norms, find_adapter_pairs
from fwlora.regularizer import UnmeasuredError
from tests.helpers.small_models import (
    EXACT,
    Block,
    attach,
    loss_of,
    make_adapted,
    make_batches,
    squared_gradient_norms,
    train,
    trainable,
)


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
        measured.append(fw._estimator.measuring)
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
    with pytest.raises(ValueError, match=r"1 matrices of `model` carry a variant of LoRA .*\('query': Dora"):
        FisherWeightedLora(dora)
    adalora = get_peft_model(Block(), AdaLoraConfig(target_modules=["query"], total_step=10))
    with pytest.raises(ValueError, match="'default' of `model` is an AdaLoRA adapter"):
        FisherWeightedLora(adalora)
    convolution = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"carry a variant of LoRA .*'0': a convolution"):
        FisherWeightedLora(convolution)


def test_every_step_has_a_sketch_of_its_own():
    """The same batch on the same weights: only the signs differ between two steps."""
    model = make_adapted()
    fw = attach(model, estimator="sketch", sketch_size=1, decay=0.0, warmup_steps=9)
    found = []
    for _ in range(3):
        model.zero_grad()
        loss_of(model, make_batches(1)[0]).backward()
        fw.step()
        found.append(fw.fisher.values.tolist())
    assert found[0] != found[1] != found[2] != found[0]


def test_a_pass_without_adapters_is_no_pass_of_theirs():
    """A penalty on the distance from the base model calls every layer a second time, with its adapter disabled."""
    (x, _), batch = make_batches(1)[0], make_batches(1)[0]

    def measure(with_base: bool) -> list[float]:
        model = make_adapted()
        fw = attach(model, estimator="exact", decay=0.0, warmup_steps=9)
        loss = loss_of(model, batch)
        if with_base:
            with model.disable_adapter():
                loss = loss + model(x.clone().requires_grad_(True)).square().mean()
        loss.backward()
        fw.step()
        return fw.fisher.values.tolist()

    assert measure(with_base=True) == measure(with_base=False)
