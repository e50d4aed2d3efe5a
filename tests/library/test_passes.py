"""Which passes of autograd a step's measurement consists of, and what copies, pickles and transforms of a model do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adapters import find_adapter_pairs
from fwlora.regularizer import UnmeasuredError
from tests.helpers.small_models import (
    loss_of,
    make_adapted,
    make_batches,
    squared_gradient_norms,
    train,
    trainable,
)

ESTIMATORS = ["exact", "sketch", "adapter"]


def attach(model: nn.Module, estimator: str = "exact", **options) -> FisherWeightedLora:
    settings = {"warmup_steps": 2, "decay": 0.0, "fisher_every": 1, "strength": 0.1, "sketch_size": 3, **options}
    return FisherWeightedLora(model, FisherWeighting(estimator=estimator, **settings))


def measured(model: nn.Module, estimator: str, run) -> torch.Tensor:
    """F of one step in which ``run`` makes the passes."""
    fw = attach(model, estimator)
    run(model)
    fw.step()
    return fw.fisher.values.clone()


def plain(model: nn.Module) -> None:
    loss_of(model, make_batches(1)[0]).backward()


def with_saliency_map(model: nn.Module) -> None:
    x, y = make_batches(1)[0]
    x = x.clone().requires_grad_(True)
    loss = (model(x) - y).square().mean()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()


def with_gradients_of_the_adapters(model: nn.Module) -> None:
    factors = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(model, make_batches(1)[0])
    torch.autograd.grad(loss, factors, retain_graph=True)
    loss.backward()
    torch.autograd.grad(loss_of(model, make_batches(1)[0]), factors)


def with_a_hessian_vector_product(model: nn.Module) -> None:
    factors = [p for p in model.parameters() if p.requires_grad]
    loss_of(model, make_batches(1)[0]).backward(create_graph=True)
    gradients = [p.grad for p in factors]
    torch.autograd.grad(gradients, factors, [torch.ones_like(p) for p in factors])


def with_an_unused_graph_of_gradients(model: nn.Module) -> None:
    x, y = make_batches(1)[0]
    x = x.clone().requires_grad_(True)
    torch.autograd.grad((model(x) - y).square().mean(), x, create_graph=True)
    plain(model)


def with_two_micro_batches(model: nn.Module) -> None:
    for batch in make_batches(2):
        loss_of(model, batch, parts=2).backward()


def with_a_gradient_penalty(model: nn.Module) -> None:
    x, y = make_batches(1)[0]
    x = x.clone().requires_grad_(True)
    loss = (model(x) - y).square().mean()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def with_a_penalty_of_a_linear_loss(model: nn.Module) -> None:
    x = make_batches(1)[0][0].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.base_model.model.query(x).sum(), x, create_graph=True)
    (loss_of(model, make_batches(1)[0]) + gradient.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "run",
    [
        with_saliency_map,
        with_gradients_of_the_adapters,
        with_a_hessian_vector_product,
        with_an_unused_graph_of_gradients,
    ],
)
def test_only_what_backward_adds_to_the_adapters_gradients_counts(run, estimator):
    found, expected = (measured(make_adapted(), estimator, passes) for passes in (run, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if estimator == "exact":
        model = make_adapted()
        truth = squared_gradient_norms(model, lambda twin: loss_of(twin, make_batches(1)[0]))
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("run", [with_a_gradient_penalty, with_a_penalty_of_a_linear_loss])
def test_the_second_order_of_a_gradient_penalty_is_refused(run, estimator):
    fw = attach(model := make_adapted(), estimator)
    run(model)
    with pytest.raises(
        RuntimeError, match=r"gradient of a gradient \(a penalty made with create_graph=True\).*adapter"
    ):
        fw.step()
    # The step can be taken again without it, and measures nothing of the refused one.
    plain(model)
    fw.step()
    torch.testing.assert_close(fw.fisher.values, measured(make_adapted(), estimator, plain), rtol=1e-12, atol=0)


def test_the_adapter_estimate_follows_a_gradient_penalty():
    model = make_adapted()
    found = measured(model, "adapter", with_a_gradient_penalty)
    twin = make_adapted()
    with_a_gradient_penalty(twin)
    expected = [
        (p.B.grad.square().sum() * p.A.shape[1] / (p.scaling**2 * p.A.square().sum())).item()
        for p in find_adapter_pairs(twin)
    ]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_partly_frozen_adapters_are_still_measured(estimator):
    model = make_adapted()
    expected = measured(make_adapted(), estimator, plain)
    frozen = find_adapter_pairs(model)[2]  # its input needs a gradient
    frozen.A.requires_grad_(False)
    if estimator != "adapter":
        frozen.B.requires_grad_(False)
    torch.testing.assert_close(measured(model, estimator, plain), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_in_its_warmup_can_be_saved_and_copied_whole(estimator, tmp_path):
    model = make_adapted()
    fw = attach(model, estimator)
    plain(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    again = pickle.loads(pickle.dumps(model))
    x = make_batches(1)[0][0]
    for other in (loaded, again, copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        loss_of(other, make_batches(2)[1]).backward()  # not the model's gradient
    fw.step()
    torch.testing.assert_close(fw.fisher.values, measured(make_adapted(), estimator, plain), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["model first", "object first"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("allocation", ["shrink", "reallocate"])
def test_a_deep_copy_of_both_goes_on_as_the_originals_do(order, steps, allocation):
    def run(model, fw, optimizer) -> list[float]:
        train(model, fw, optimizer, 4)
        return [p.sum().item() for p in trainable(model)] + fw.fisher.values.tolist() + list(fw.importance().values())

    model = make_adapted(hidden=9)
    fw = attach(model, allocation=allocation, warmup_steps=2)
    train(model, fw, torch.optim.SGD(trainable(model), lr=0.05), steps)
    pair = (model, fw) if order == "model first" else (fw, model)
    copied = copy.deepcopy(pair)
    twin, held = copied if order == "model first" else copied[::-1]
    assert held is not fw and {id(p.A) for p in held.pairs if p.rank} <= {id(p) for p in twin.parameters()}
    expected = run(model, fw, torch.optim.SGD(trainable(model), lr=0.05))
    assert run(twin, held, torch.optim.SGD(trainable(twin), lr=0.05)) == expected
    assert held.state_dict() == fw.state_dict()
    if allocation == "reallocate":
        assert twin.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    with pytest.raises(ValueError, match="already has a FisherWeightedLora"):
        attach(twin)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_transforms_of_torch_func_work_and_are_not_measured(estimator):
    def per_example(model: nn.Module) -> dict[str, torch.Tensor]:
        x, y = make_batches(1)[0]
        values = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values, x, y):
            return (torch.func.functional_call(model, values, (x[None],)) - y).square().mean()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, x, y)

    expected = per_example(make_adapted())

    def run(model: nn.Module) -> None:
        found = per_example(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        plain(model)

    found = measured(make_adapted(), estimator, run)
    torch.testing.assert_close(found, measured(make_adapted(), estimator, plain), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vectors_and_keyword_calls_are_measured(estimator):
    def vectors(model: nn.Module) -> None:
        for x in make_batches(1)[0][0]:
            model.base_model.model.query(x).square().sum().backward()

    def rows(model: nn.Module) -> None:
        model.base_model.model.query(make_batches(1)[0][0]).square().sum().backward()

    def by_keyword(model: nn.Module) -> None:
        model.base_model.model.query(x=make_batches(1)[0][0]).square().sum().backward()

    expected = measured(make_adapted(), estimator, rows)
    for run in (vectors, by_keyword):
        torch.testing.assert_close(measured(make_adapted(), estimator, run), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_warmup_that_measured_nothing_stays_an_error_until_it_can_freeze(factor):
    def step(model, fw, factor: float) -> None:
        model.zero_grad()
        (factor * loss_of(model, make_batches(1)[0])).backward()
        fw.step()

    model = make_adapted()
    fw = attach(model, warmup_steps=2)
    step(model, fw, factor)
    for _ in range(2):
        with pytest.raises(UnmeasuredError):
            step(model, fw, factor)
    assert fw.in_warmup
    again = attach(other := make_adapted(), warmup_steps=2)
    again.load_state_dict(fw.state_dict())
    for held, of in ((fw, model), (again, other)):
        step(of, held, 1.0)
        assert not held.in_warmup and held.steps == 4
    assert fw.importance() == again.importance()


def test_numpy_numbers_are_options():
    import numpy as np

    options = FisherWeighting(strength=np.float32(0.5), warmup_steps=np.int64(3), decay=np.float64(0.5))
    assert options == FisherWeighting(strength=0.5, warmup_steps=3, decay=0.5)
    assert [type(v) for v in (options.strength, options.warmup_steps, options.decay)] == [float, int, float]
    with pytest.raises(ValueError, match=r"`warmup_steps` is 2\.5"):
        FisherWeighting(warmup_steps=np.float32(2.5))
