"""The three estimators of squared gradient norms: against autograd, against the reference, in distribution."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fwlora import reference
from fwlora.adapters import find_adapter_pairs
from fwlora.estimators import AdapterEstimator, ExactEstimator, SketchEstimator
from fwlora.importance import FisherAccumulator
from tests.helpers.small_models import loss_of, make_adapted, make_batches, squared_gradient_norms


def step_loss(data):
    return lambda model: sum(loss_of(model, batch, len(data)) for batch in data)


def passes_of(model: nn.Module, data) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """(X, G) of every call of every adapted module, from hooks of the test's own."""
    seen: list[list] = []
    for pair in find_adapter_pairs(model):
        calls: list = []
        seen.append(calls)

        def hook(module, args, output, calls=calls):
            call = [args[0].detach().numpy(), None]
            calls.append(call)
            output.register_hook(lambda gradient: call.__setitem__(1, gradient.numpy()))

        pair.module.register_forward_hook(hook)
    step_loss(data)(model).backward()
    return [[(X, G) for X, G in calls] for calls in seen]


@pytest.mark.parametrize("parts", [1, 3])
def test_exact_is_autograds_own_weight_gradient_summed_before_the_norm(parts):
    model, data = make_adapted(), make_batches(parts)
    expected = squared_gradient_norms(model, step_loss(data))
    estimator = ExactEstimator(find_adapter_pairs(model))
    estimator.start(1)
    for batch in data:
        loss_of(model, batch, parts).backward()
    assert not any(pair.module.base_layer.weight.requires_grad for pair in find_adapter_pairs(model))
    torch.testing.assert_close(estimator.take_squared_norms(), expected, rtol=1e-12, atol=0)
    one_by_one = sum(squared_gradient_norms(model, step_loss([batch])) for batch in data) / parts
    assert parts == 1 or not torch.allclose(one_by_one, expected, rtol=0.05)


def test_exact_and_sketch_are_the_reference_on_the_same_passes():
    model, data = make_adapted(), make_batches(2)
    passes = passes_of(copy.deepcopy(model), data)
    pairs = find_adapter_pairs(model)
    exact, sketch = ExactEstimator(pairs), SketchEstimator(pairs, size=3, seed=5)
    for estimator in (exact, sketch):
        estimator.start(7)
    signs = {width: sketch._draw_signs(width, torch.device("cpu"), torch.float64).clone() for width in (5, 4)}
    for batch in data:
        loss_of(model, batch, 2).backward()
    expected = [reference.exact_squared_norm(calls) for calls in passes]
    np.testing.assert_allclose(exact.take_squared_norms().numpy(), expected, rtol=1e-12)
    expected = [
        reference.sketch_squared_norm(calls, signs[calls[0][0].shape[1]].numpy() / np.sqrt(3)) for calls in passes
    ]
    np.testing.assert_allclose(sketch.take_squared_norms().numpy(), expected, rtol=1e-12)


def test_adapter_estimate_is_the_reference_and_sums_micro_batches_before_the_norm():
    model, data = make_adapted({"key": 3}), make_batches(3)
    pairs = find_adapter_pairs(model)
    estimator = AdapterEstimator(pairs)
    estimator.start(1)
    for batch in data:
        loss_of(model, batch, 3).backward()
    expected = [
        reference.adapter_squared_norm(pair.B.grad.numpy(), pair.A.detach().numpy(), pair.scaling) for pair in pairs
    ]
    for pair in pairs:
        pair.B.grad.mul_(0.01)  # a loop that clips before it asks
    np.testing.assert_allclose(estimator.take_squared_norms().numpy(), expected, rtol=1e-12)


def test_adapter_estimate_is_right_on_average_over_initial_factors():
    estimates = []
    for seed in range(300):
        model, (batch,) = make_adapted(seed=1), make_batches(1)
        pairs = find_adapter_pairs(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for pair in pairs:
                pair.B.zero_()
                pair.A.copy_(torch.randn(pair.A.shape, dtype=torch.float64, generator=generator))
                pair.A.mul_(pair.A.shape[1] ** 0.5 / pair.A.norm(dim=1, keepdim=True))
        estimator = AdapterEstimator(pairs)
        estimator.start(1)
        loss_of(model, batch).backward()
        estimates.append(estimator.take_squared_norms())
        estimator.close()
    expected = squared_gradient_norms(model, step_loss([batch]))
    drawn = torch.stack(estimates)
    error = drawn.std(dim=0) / len(drawn) ** 0.5
    assert ((drawn.mean(dim=0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("size", [1, 4])
def test_sketch_is_unbiased_with_the_variance_predicted(size):
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 12, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 2, 12)
    G = torch.randn(30, 6, dtype=torch.float64, generator=generator) @ torch.randn(
        6, 6, dtype=torch.float64, generator=generator
    )
    gradient = G.T @ X
    estimator = SketchEstimator([], size, seed=3)
    estimates = []
    for step in range(draws):
        estimator.start(step)
        estimator._signs.clear()
        signs = estimator._draw_signs(12, torch.device("cpu"), torch.float64)
        estimates.append((gradient @ signs).square().sum() / size)
    drawn = torch.stack(estimates)
    exact = reference.exact_squared_norm([(X.numpy(), G.numpy())])
    variance = reference.sketch_variance(gradient.numpy(), size)
    assert abs(float(drawn.mean()) - exact) < 4 * (variance / draws) ** 0.5
    # The variance of a sample variance: kurtosis times the variance squared over the number of draws.
    centred = drawn - drawn.mean()
    error = float(((centred**4).mean() - (centred**2).mean() ** 2) / draws) ** 0.5
    assert abs(float(drawn.var()) - variance) < 4 * error


def test_sketches_are_the_same_for_the_same_step_and_no_others():
    def draw(seed: int, step: int, width: int) -> torch.Tensor:
        estimator = SketchEstimator([], 8, seed)
        estimator.start(step)
        return estimator._draw_signs(width, torch.device("cpu"), torch.float32)

    first = draw(0, 1, 64)
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(first, draw(0, 1, 64))
    others = [draw(1, 1, 64), draw(0, 2, 64), draw(0, 1, 65)[:64], draw(0, 1, 63)]
    agreement = [float((first[: len(other)] == other).double().mean()) for other in others]
    assert all(0.35 < share < 0.65 for share in agreement)
    # Neighbouring steps must not be related either: the sum over many of them stays that of independent signs.
    total = sum(draw(0, step, 64) for step in range(400))
    assert 0.8 < float(total.var() / 400) < 1.2


def test_measuring_leaves_the_training_stream_alone():
    model, (batch,) = make_adapted(), make_batches(1)
    estimator = SketchEstimator(find_adapter_pairs(model), 8)
    estimator.start(1)
    before = torch.get_rng_state()
    loss_of(model, batch).backward()
    estimator.take_squared_norms()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_sketch_of_an_input_serves_every_module_that_reads_it(monkeypatch):
    model, (batch,) = make_adapted(), make_batches(1)
    taken = []
    compress = SketchEstimator._compress
    monkeypatch.setattr(SketchEstimator, "_compress", lambda self, X: taken.append(X.shape) or compress(self, X))
    estimator = SketchEstimator(find_adapter_pairs(model), 2)
    estimator.start(1)
    loss_of(model, batch).backward()
    assert taken == [(7, 5), (7, 4), (7, 4)]  # query and key share; output's two inputs differ
    assert estimator._latest[0]() is None  # and no input is kept alive


def test_an_input_changed_in_place_is_sketched_anew():
    model, _ = make_adapted(), None
    pairs = find_adapter_pairs(model)
    estimator = SketchEstimator(pairs, 2)
    estimator.start(1)
    x = torch.randn(3, 5, dtype=torch.float64)
    first = estimator._compress_input(x).clone()
    x.mul_(2)
    torch.testing.assert_close(estimator._compress_input(x), 2 * first)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(True), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recorder_of", [ExactEstimator, lambda pairs: SketchEstimator(pairs, 400_000)])
def test_gradient_checkpointing_counts_every_call_once(reentrant, recorder_of):
    model, (batch,) = make_adapted(), make_batches(1)
    expected = squared_gradient_norms(model, step_loss([batch]))
    estimator = recorder_of(find_adapter_pairs(model))
    estimator.start(1)
    loss_of(Checkpointed(model, reentrant), batch).backward()
    torch.testing.assert_close(estimator.take_squared_norms(), expected, rtol=0.02, atol=0)


def test_modules_that_a_step_does_not_use_have_gradient_zero():
    model, (batch,) = make_adapted(), make_batches(1)
    estimator = ExactEstimator(find_adapter_pairs(model))
    estimator.start(1)
    model.base_model.model.query(batch[0]).square().mean().backward()
    norms = estimator.take_squared_norms()
    assert norms[0] > 0 and norms[1:].tolist() == [0.0, 0.0]


def test_forward_passes_without_backward_are_not_counted():
    model, data = make_adapted(), make_batches(2)
    expected = squared_gradient_norms(model, step_loss(data[:1]))
    estimator = ExactEstimator(find_adapter_pairs(model))
    estimator.start(1)
    with torch.no_grad():
        loss_of(model, data[1])
    loss_of(model, data[1])
    loss_of(model, data[0]).backward()
    torch.testing.assert_close(estimator.take_squared_norms(), expected, rtol=1e-12, atol=0)


def test_a_deep_copy_of_the_model_is_not_measured():
    model, data = make_adapted(), make_batches(2)
    expected = squared_gradient_norms(model, step_loss(data[:1]))
    estimator = ExactEstimator(find_adapter_pairs(model))
    estimator.start(1)
    loss_of(copy.deepcopy(model), data[1]).backward()
    loss_of(model, data[0]).backward()
    torch.testing.assert_close(estimator.take_squared_norms(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [ExactEstimator, AdapterEstimator, lambda pairs: SketchEstimator(pairs, 2)])
def test_loss_scale_is_divided_out(make):
    model, (batch,) = make_adapted(), make_batches(1)
    estimator, norms = make(find_adapter_pairs(model)), []
    for scale in (1.0, 1024.0):
        estimator.start(1)
        (scale * loss_of(model, batch)).backward()
        norms.append(estimator.take_squared_norms(scale))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)]
)
def test_low_precision_gradients(dtype, tolerance):
    torch.manual_seed(0)
    pairs = find_adapter_pairs(make_adapted())
    X, G = torch.randn(500, 5).to(dtype), (3000 * torch.randn(500, 4)).to(dtype)
    exact = (G.double().T @ X.double()).square().sum()
    for estimator in (ExactEstimator(pairs), SketchEstimator(pairs, 3)):
        estimator.start(1)
        estimator.observe(0, X, G)
        norm = estimator.take_squared_norms()[0].double()
        if isinstance(estimator, SketchEstimator):
            signs = estimator._draw_signs(5, torch.device("cpu"), torch.float64)
            exact = (G.double().T @ X.double() @ signs).square().sum() / 3
            torch.testing.assert_close(norm, exact, rtol=tolerance, atol=0)
        else:  # the reference estimator multiplies in float32 whatever it is given
            torch.testing.assert_close(norm, exact, rtol=1e-5, atol=0)


def test_steps_that_are_not_measured_record_nothing():
    model, (batch,) = make_adapted(), make_batches(1)
    estimator = ExactEstimator(find_adapter_pairs(model))
    loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match="before any backward pass reached"):
        estimator.take_squared_norms()
    estimator.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_moving_average_is_the_reference():
    generator = np.random.default_rng(0)
    steps = [generator.random(4) for _ in range(9)]
    steps[4][2] = np.nan
    for every in (1, 2, 4):
        fisher = FisherAccumulator(4, 0.9**every, dtype=torch.float64)
        for norms in steps[::every]:
            fisher.update(torch.from_numpy(norms))
        np.testing.assert_allclose(fisher.values.numpy(), reference.moving_average(steps, 0.9, every), rtol=1e-12)
        assert (int(fisher.measured), int(fisher.skipped)) == (len(steps[::every]) - 1, 1)


def test_accumulator_by_hand():
    fisher = FisherAccumulator(2, 0.5, dtype=torch.float64)
    fisher.update(torch.tensor([4.0, 0.0]))
    fisher.update(torch.tensor([float("inf"), 1.0]))
    fisher.update(torch.tensor([2.0, 8.0]))
    assert fisher.values.tolist() == [2.0, 4.0]
    assert (int(fisher.measured), int(fisher.skipped)) == (2, 1)
    with pytest.raises(ValueError, match="`decay` is 1"):
        FisherAccumulator(2, 1.0)


def test_a_backward_pass_after_the_measurement_is_not_recorded():
    model, data = make_adapted(), make_batches(2)
    for estimator in (ExactEstimator(find_adapter_pairs(model)), SketchEstimator(find_adapter_pairs(model), 4)):
        estimator.start(1)
        late = loss_of(model, data[1])
        loss_of(model, data[0]).backward()
        estimator.take_squared_norms()
        late.backward()
        estimator.start(2)
        with pytest.raises(RuntimeError, match="before any backward pass"):
            estimator.take_squared_norms()
        estimator.close()


def test_one_input_is_sketched_with_each_steps_own_signs():
    model, (batch,) = make_adapted(), make_batches(1)
    estimator, seen = SketchEstimator(find_adapter_pairs(model), 2), []
    for step in (1, 2):
        estimator.start(step)
        loss_of(model, batch).backward()
        seen.append(estimator.take_squared_norms())
    assert not torch.allclose(seen[0][:2], seen[1][:2], rtol=1e-3)


def test_backward_inside_autocast_multiplies_the_reference_in_float32():
    model, norms = make_adapted().float(), []
    x = torch.randn(64, 5)
    estimator = ExactEstimator(find_adapter_pairs(model))
    for inside in (False, True):
        estimator.start(1)
        loss = model(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            estimator.observe(0, x, torch.ones(64, 4))
        del loss
        norms.append(estimator.take_squared_norms()[0])
    assert torch.equal(norms[0], norms[1])


def test_partly_frozen_adapters_are_measured_where_they_train():
    model, (batch,) = make_adapted(), make_batches(1)
    pairs = find_adapter_pairs(model)
    pairs[1].B.requires_grad_(False)
    estimator = AdapterEstimator(pairs)
    estimator.start(1)
    loss_of(model, batch).backward()
    norms = estimator.take_squared_norms()
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0
