"""AdaLoRA's orthogonality term in closed form, against autograd and by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fwlora.orthogonality import orthogonality_term

# (r, d_in, d_out) of matrices whose shapes partly agree.
SHAPES = [(3, 6, 4), (3, 4, 6), (2, 4, 3), (1, 5, 4)]


def random_factors() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(r, d_in, dtype=torch.float64, generator=generator, requires_grad=True),
            torch.randn(d_out, r, dtype=torch.float64, generator=generator, requires_grad=True),
        )
        for r, d_in, d_out in SHAPES
    ]


def literal_term(factors: list[tuple[Tensor, Tensor]], weight: float) -> Tensor:
    """The definition, left to autograd."""
    norms = []
    for A, B in factors:
        identity = torch.eye(len(A), dtype=A.dtype)
        norms += [torch.linalg.matrix_norm(A @ A.T - identity), torch.linalg.matrix_norm(B.T @ B - identity)]
    return weight * torch.stack(norms).mean()


def test_value_and_gradient_are_those_of_the_definition():
    factors = random_factors()
    flat = [factor for pair in factors for factor in pair]
    value, expected = 3 * orthogonality_term(factors, 0.5), 3 * literal_term(factors, 0.5)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    gradients, expected_gradients = torch.autograd.grad(value, flat), torch.autograd.grad(expected, flat)
    for gradient, one in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-12, atol=1e-14)


def test_by_hand():
    # A A^T - I = 3 for A = (2, 0); B is orthonormal, where the norm has no derivative and its gradient is 0.
    A = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    B = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    value = orthogonality_term([(A, B)], 0.5)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.5 / 2 * 3)
    assert A.grad is not None and A.grad.tolist() == [[pytest.approx(0.5 / 2 * 2 * 2), 0.0]]
    assert B.grad is not None and B.grad.tolist() == [[0.0], [0.0]]


def test_its_gradient_can_be_differentiated():
    factors = random_factors()
    flat = [factor for pair in factors for factor in pair]

    def term(*flat: Tensor) -> Tensor:
        return orthogonality_term(list(zip(flat[::2], flat[1::2], strict=True)), 0.5)

    assert torch.autograd.gradcheck(term, flat) and torch.autograd.gradgradcheck(term, flat)


def test_frozen_factors_get_no_gradient():
    factors = random_factors()
    factors[0][0].requires_grad_(False)
    orthogonality_term(factors, 0.5).backward()
    assert factors[0][0].grad is None and factors[1][0].grad is not None
