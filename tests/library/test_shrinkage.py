"""Importances, the penalty, its closed-form gradient, changing ranks: against the reference and by hand, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fwlora import reference
from fwlora.adapters import delta_norms, find_adapter_pairs
from fwlora.importance import normalize_importance
from fwlora.options import NORMALIZATIONS
from fwlora.reallocation import resize_factors
from fwlora.shrinkage import BatchedShrinkage, shrinkage_penalty, squared_delta_norm
from tests.helpers.small_models import make_adapted

# (r, d_in, d_out) of matrices whose shapes and ranks partly agree.
SHAPES = [(2, 5, 4), (3, 5, 4), (2, 4, 3), (1, 5, 4), (2, 4, 3)]
SCALINGS = [3.0, 2.0, 0.5, 1.0, 2.5]


def random_factors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(r, d_in, dtype=torch.float64, generator=generator, requires_grad=True),
            torch.randn(d_out, r, dtype=torch.float64, generator=generator, requires_grad=True),
        )
        for r, d_in, d_out in SHAPES
    ]


def as_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def test_penalty_is_gradchecked_and_the_reference():
    factors, importance = random_factors(), torch.tensor([0.1, 0.7, 0.0, 1.0, 0.4], dtype=torch.float64)

    def penalty(*flat):
        return shrinkage_penalty(list(zip(flat[::2], flat[1::2], strict=True)), SCALINGS, 1 - importance, 0.1)

    flat = [factor for pair in factors for factor in pair]
    assert torch.autograd.gradcheck(penalty, flat)
    literal = [(*as_numpy(A, B), s) for (A, B), s in zip(factors, SCALINGS, strict=True)]
    expected = reference.penalty(literal, importance.numpy(), 0.1)
    assert float(penalty(*flat).detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_batched_gradient_is_the_references_for_every_matrix(factor):
    factors, importance = random_factors(), torch.tensor([0.1, 0.7, 0.0, 1.0, 0.4], dtype=torch.float64)
    coefficients = 0.1 * (1 - importance) * torch.tensor(SCALINGS, dtype=torch.float64).square()
    shrinkage = BatchedShrinkage(factors, coefficients)
    existing = torch.full_like(factors[1][0], 0.25)
    factors[1][0].grad = existing.clone()
    for _ in range(2):  # the second call must not see anything of the first
        value = shrinkage.add_gradients(factor)
    for place, ((A, B), s) in enumerate(zip(factors, SCALINGS, strict=True)):
        for_A, for_B = reference.penalty_gradients(*as_numpy(A, B), s, float(importance[place]), 0.1)
        start = existing.numpy() if place == 1 else 0.0
        np.testing.assert_allclose(A.grad.numpy(), start + 2 * factor * for_A, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(B.grad.numpy(), 2 * factor * for_B, rtol=1e-12, atol=1e-13)
        assert A.grad.is_contiguous() and B.grad.is_contiguous()
    literal = [(*as_numpy(A, B), s) for (A, B), s in zip(factors, SCALINGS, strict=True)]
    assert float(value) == pytest.approx(reference.penalty(literal, importance.numpy(), 0.1), rel=1e-12)


def test_frozen_factors_get_no_gradient():
    factors = random_factors()
    factors[0][0].requires_grad_(False)
    BatchedShrinkage(factors, torch.ones(5, dtype=torch.float64)).add_gradients()
    assert factors[0][0].grad is None and factors[0][1].grad is not None


def test_gradients_follow_factors_that_changed_in_place():
    factors = random_factors()
    shrinkage = BatchedShrinkage(factors, torch.linspace(0.2, 1.0, 5, dtype=torch.float64))
    for _ in range(2):
        for pair in factors:
            for factor in pair:
                factor.grad = None
                factor.data += 0.1
        value = shrinkage.add_gradients()
        coefficients = torch.linspace(0.2, 1.0, 5, dtype=torch.float64)
        term = torch.stack([squared_delta_norm(A, B, 1.0) for A, B in factors]) @ coefficients
        parameters = [factor for pair in factors for factor in pair]
        for factor, expected in zip(parameters, torch.autograd.grad(term, parameters), strict=True):
            torch.testing.assert_close(factor.grad, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(value, term.detach(), rtol=1e-12, atol=0)


def test_squared_norms_of_stacks_are_those_of_the_formed_updates():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    B = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(squared_delta_norm(A, B, 2.0), (2.0 * B @ A).square().sum(dim=(1, 2)))


def test_delta_norms_are_those_of_the_formed_update():
    pairs = find_adapter_pairs(make_adapted({"key": 3}))
    expected = [torch.linalg.matrix_norm(pair.module.get_delta_weight("default")) for pair in pairs]
    torch.testing.assert_close(delta_norms(pairs), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [("sum", [0.1, 0.3, 0.6]), ("max", [1 / 6, 0.5, 1.0]), ("mean", [0.15, 0.45, 0.9]), ("none", [0.0, 0.0, 0.0])],
)
def test_importance_by_hand(normalization, expected):
    fisher = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(normalize_importance(fisher, normalization), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_importance_is_the_reference_and_only_proportions_count(normalization):
    fisher = torch.rand(36, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    expected = reference.importance(fisher.numpy(), normalization)
    for scale in (1.0, 1e-6, 1e6):
        found = normalize_importance(scale * fisher, normalization)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert float(found.min()) >= 0 and float(found.max()) <= 1


def test_importance_refuses_what_is_no_importance():
    with pytest.raises(ValueError, match="zero everywhere"):
        normalize_importance(torch.zeros(2))
    with pytest.raises(ValueError, match="negative or non-finite"):
        normalize_importance(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="'softmax'"):
        normalize_importance(torch.ones(2), "softmax")


def factors_of_decreasing_directions(r: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(r, 9, dtype=torch.float64, generator=generator)
    B = torch.randn(7, r, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 0.1][:r])
    return A, B


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_shrinking_a_rank_keeps_the_best_directions(rank):
    A, B = factors_of_decreasing_directions()
    new_A, new_B = resize_factors(A, B, rank, torch.Generator())
    assert new_A.shape == (rank, 9) and new_B.shape == (7, rank)
    np.testing.assert_allclose(
        (new_B @ new_A).numpy(), reference.best_approximation(A.numpy(), B.numpy(), rank), atol=1e-12
    )
    # Rows as long as they were on average, so that B keeps its proportion to A.
    lengths = new_A.norm(dim=1)
    torch.testing.assert_close(lengths, A.square().sum(dim=1).mean().sqrt().expand(rank), rtol=1e-12, atol=0)
    lost = torch.linalg.matrix_norm(B @ A - new_B @ new_A).square()
    spectrum = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(lost, spectrum[rank:].square().sum(), rtol=1e-9, atol=1e-12)


def test_growing_a_rank_changes_no_update():
    A, B = factors_of_decreasing_directions(2)
    new_A, new_B = resize_factors(A, B, 5, torch.Generator().manual_seed(0))
    assert torch.equal(new_A[:2], A) and torch.equal(new_B[:, :2], B)
    assert torch.equal(new_B[:, 2:], torch.zeros(7, 3, dtype=torch.float64))
    assert new_A[2:].abs().max() <= 1 / 3 and new_A[2:].abs().min() > 0
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-15, atol=0)
    assert torch.equal(resize_factors(A, B, 2, torch.Generator())[0], A)


def test_new_rows_are_spread_as_peft_initializes_them():
    rows = resize_factors(torch.zeros(0, 64), torch.zeros(8, 0), 500, torch.Generator().manual_seed(0))[0]
    assert float(rows.var()) == pytest.approx(1 / (3 * 64), rel=0.03)


def test_an_update_of_zero_shrinks_to_zero():
    A = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    new_A, new_B = resize_factors(A, torch.zeros(5, 3), 2, torch.Generator())
    assert torch.isfinite(new_A).all() and torch.equal(new_B, torch.zeros(5, 2))
    dead = resize_factors(torch.zeros(3, 6), torch.zeros(5, 3), 2, torch.Generator())
    assert all(torch.isfinite(factor).all() for factor in dead)
