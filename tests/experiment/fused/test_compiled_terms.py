"""The gradients of the methods' own terms by compiled kernels against those of torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adalora import AdaLora, attach_adalora, plan_adalora
from fwlora.architectures import find_target_matrices
from fwlora.experiment.fused.compiled import load_kernels
from fwlora.experiment.fused.compiled_terms import (
    CompiledOrthogonality,
    CompiledShrinkage,
    make_shrinkage,
    takes_factors,
)
from fwlora.experiment.fused.forward import PlainClassifier
from fwlora.experiment.methods import Method
from fwlora.experiment.methods.adalora import AdaLoraMethod
from fwlora.experiment.methods.fw_lora import FwLoraMethod
from fwlora.orthogonality import orthogonality_term
from fwlora.shrinkage import BatchedShrinkage
from tests.helpers.fused_models import ALL, adapt, make_base


def take_steps(model: nn.Module, method: Method, count: int) -> list[float]:
    """Train on fixed tokens as the engine does; return the logged penalties."""
    tokens = torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(1))
    classifier = PlainClassifier(model.get_base_model())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    penalties = []
    for step in range(1, count + 1):
        loss = nn.functional.cross_entropy(classifier(input_ids=tokens), torch.tensor([0, 1, 1, 0, 1]))
        term = method.loss_term()
        (loss if term is None else loss + term).backward()
        method.after_backward(optimizer)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
        penalties.append(float(method.step_values()["penalty"]))
    return penalties


@pytest.mark.parametrize("ranks", [(1,), (3, 4, 8), (17, 2)])
@pytest.mark.parametrize("factor", [1.0, 0.5, torch.tensor(2.0)])
def test_the_shrinkage_kernel_is_the_batched_form(ranks, factor):
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 48), (37, 32), (20, 5), (384, 1536)]
    factors = []
    for place, (d_in, d_out) in enumerate(shapes):
        rank = ranks[place % len(ranks)]
        factors.append((
            nn.Parameter(torch.randn(rank, d_in, generator=generator)),
            nn.Parameter(torch.randn(d_out, rank, generator=generator)),
        ))  # fmt: skip
    factors[1][0].requires_grad_(False)
    coefficients = torch.tensor([0.3, 0.9, 0.0, 0.2])
    parameters = [parameter for pair in factors for parameter in pair]
    starts = [None if place == 2 else torch.randn(p.shape, generator=generator) for place, p in enumerate(parameters)]
    doubles = [(nn.Parameter(A.detach().double()), nn.Parameter(B.detach().double())) for A, B in factors]
    found = []
    for made, own in (
        (make_shrinkage(load_kernels(torch.float32), factors, coefficients), factors),
        (BatchedShrinkage(doubles, coefficients.double()), doubles),
    ):
        flat = [parameter for pair in own for parameter in pair]
        flat[2].requires_grad_(False)
        for parameter, start in zip(flat, starts, strict=True):
            if parameter.requires_grad and start is not None:
                parameter.grad = start.to(parameter.dtype).clone()
        found.append((made.add_gradients(factor), [parameter.grad for parameter in flat]))
    assert isinstance(make_shrinkage(load_kernels(torch.float32), factors, coefficients), CompiledShrinkage)
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    for ours, expected in zip(found[0][1], found[1][1], strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            assert float((ours.double() - expected).norm() / expected.norm()) < 1e-5


def test_factors_of_another_type_are_left_to_torchs_operations():
    factors = [(torch.randn(2, 8, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))]
    assert isinstance(make_shrinkage(load_kernels(torch.float32), factors, torch.ones(1)), BatchedShrinkage)


def test_the_engines_kernels_shrink_what_the_loop_without_them_shrinks():
    found = []
    for kernels in (None, load_kernels(torch.float32)):
        model = adapt(make_base()).float()
        method = FwLoraMethod(FisherWeightedLora(model, FisherWeighting(warmup_steps=1, strength=0.1)))
        if kernels is not None:
            method.use_kernels(kernels)
        penalties = take_steps(model, method, 3)
        found.append((penalties, [pair.B.detach().clone() for pair in method.pairs]))
        kind = CompiledShrinkage if kernels else BatchedShrinkage
        assert isinstance(method.fisher_weighted._shrinkage, kind)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 12, 19])
def test_the_orthogonality_kernel_is_the_closed_form(rank):
    generator = torch.Generator().manual_seed(0)
    factors = [
        (
            nn.Parameter(torch.randn(rank, d_in, generator=generator) / d_in**0.5),
            nn.Parameter(torch.randn(d_out, rank, generator=generator)),
        )
        for d_in, d_out in [(32, 48), (37, 32), (20, 21), (384, 1536)]
    ]
    factors[1][0].requires_grad_(False)
    with torch.no_grad():  # where the norm has no derivative
        factors[0][0].copy_(torch.eye(rank, 32))
    flat = [factor for pair in factors for factor in pair]
    doubles = [factor.detach().double().requires_grad_(factor.requires_grad) for factor in flat]
    expected = orthogonality_term(list(zip(doubles[::2], doubles[1::2], strict=True)), 0.3)
    expected.backward()
    flat[4].grad = torch.ones_like(flat[4])
    doubles[4].grad += 1.0
    value = CompiledOrthogonality(load_kernels(torch.float32), factors, 0.3).add_gradients()
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert flat[2].grad is None
    assert not flat[0].grad.any() and not doubles[0].grad.any()
    for factor, double in zip(flat[3:], doubles[3:], strict=True):
        assert float((factor.grad.double() - double.grad).norm() / double.grad.norm()) < 1e-5


def make_adalora(weight: float) -> tuple[nn.Module, AdaLoraMethod]:
    base = make_base()
    matrices = find_target_matrices(base, ALL)
    plan = plan_adalora(matrices, 3 * sum(matrix.cost for matrix in matrices), 3.0, 1.5)
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": weight}
    model = attach_adalora(base, matrices, plan, scaling=2.0, dropout=0.0, total_steps=9, schedule=schedule)
    return model, AdaLoraMethod(AdaLora(model, plan))


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_adalora_by_kernels_takes_the_steps_of_torchs_operations(weight):
    found = []
    for kernels in (None, load_kernels(torch.float32)):
        model, method = make_adalora(weight)
        if kernels is not None:
            method.use_kernels(kernels)
            assert (method.loss_term() is None) and (method._compiled_term is not None) == bool(weight)
        penalties = take_steps(model, method, 3)
        assert (penalties[0] > 0) == bool(weight)
        found.append((penalties, [factor.detach().clone() for pair in method.pairs for factor in (pair.A, pair.B)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_adaloras_factors_of_another_type_are_left_to_torchs_operations():
    model, method = make_adalora(0.5)
    model.double()
    method.use_kernels(load_kernels(torch.float32))
    assert not takes_factors([(pair.A, pair.B) for pair in method.pairs]) and method.loss_term() is not None
