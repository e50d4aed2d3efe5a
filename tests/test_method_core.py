"""Fisher proxies, importances, shrinkage: against autograd and hand-computed values, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fwlora.adapters import delta_norms, find_adapter_pairs
from fwlora.fisher import FisherAccumulator, GradientRecorder
from fwlora.importance import normalise_importance
from fwlora.regularizer import FisherWeightedLora
from fwlora.shrinkage import shrinkage_gradients, shrinkage_penalty, squared_delta_norm


class Block(nn.Module):
    """Two projections of one input and one after them, called twice on purpose; the input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(5, 4)
        self.key = nn.Linear(5, 4)
        self.output = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.query(x)) * self.key(x)
        return self.output(hidden) + self.output(hidden.flip(0))


def adapted(rank_pattern: dict[str, int] | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "key", "output"], rank_pattern=rank_pattern or {})
    model = get_peft_model(Block().double(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    return model


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(7, 5, dtype=torch.float64, generator=generator),
            torch.randn(7, 3, dtype=torch.float64, generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], parts: int) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean() / parts


def autograd_squared_norms(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The independent way: let autograd differentiate the base weights of a copy."""
    twin = copy.deepcopy(model)
    weights = [pair.module.base_layer.weight.requires_grad_(True) for pair in find_adapter_pairs(twin)]
    sum(loss_of(twin, batch, len(data)) for batch in data).backward()
    return torch.stack([weight.grad.square().sum() for weight in weights])


def test_measured_gradients_are_autograds_and_sum_over_micro_batches_before_the_norm():
    model, data = adapted(), batches(3)
    expected = autograd_squared_norms(model, data)
    fw = FisherWeightedLora(model, warmup_steps=5, decay=0.75)
    for batch in data:
        loss_of(model, batch, len(data)).backward()
    fw.step()
    assert not any(pair.module.base_layer.weight.requires_grad for pair in fw.pairs)
    torch.testing.assert_close(fw.fisher.values, 0.25 * expected, rtol=1e-12, atol=0)
    one_by_one = sum(autograd_squared_norms(model, [batch]) for batch in data) / 3
    assert not torch.allclose(one_by_one, expected, rtol=0.05)


def test_importance_is_frozen_at_the_step_asked_for_and_follows_the_moving_average():
    model = adapted()
    fw = FisherWeightedLora(model, warmup_steps=2, decay=0.9)
    expected = torch.zeros(3, dtype=torch.float64)
    for batch in batches(2):
        assert fw.in_warmup
        expected = 0.9 * expected + 0.1 * autograd_squared_norms(model, [batch])
        model.zero_grad()
        loss_of(model, batch, 1).backward()
        fw.step()
    assert not fw.in_warmup
    importance = torch.tensor(list(fw.importance().values()), dtype=torch.float64)
    torch.testing.assert_close(importance, expected / expected.sum(), rtol=1e-12, atol=0)
    assert list(fw.importance()) == ["query", "key", "output"]


def test_warmup_leaves_gradients_alone_and_no_hook_outlives_it():
    model, (first,) = adapted(), batches(1)
    reference = copy.deepcopy(model)
    loss_of(reference, first, 1).backward()
    fw = FisherWeightedLora(model, strength=10.0, warmup_steps=1)
    loss_of(model, first, 1).backward()
    fw.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    assert not any(module._forward_hooks for module in model.modules())
    assert fw.penalty().item() > 0


@pytest.mark.parametrize("rank_pattern", [{}, {"query": 3, "output": 1}])
def test_step_equals_the_term_in_the_loss(rank_pattern):
    first, second = batches(2)
    model = adapted(rank_pattern)
    fw = FisherWeightedLora(model, strength=0.7, warmup_steps=1)
    loss_of(model, first, 1).backward()
    fw.step()
    importance = list(fw.importance().values())
    model.zero_grad()
    # The literal loss: lambda sum (1 - I) ||s B A||^2 with the update formed in full.
    penalty = 0.7 * sum(
        (1 - weight) * (pair.scaling * pair.B @ pair.A).square().sum()
        for weight, pair in zip(importance, fw.pairs, strict=True)
    )
    (loss_of(model, second, 1) + penalty).backward()
    twin_gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    loss_of(model, second, 1).backward()
    fw.step()
    for got, expected in zip((p.grad for p in model.parameters() if p.requires_grad), twin_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fw.last_penalty, penalty.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(fw.penalty(), penalty, rtol=1e-12, atol=0)


def test_zero_strength_is_lora_bit_for_bit():
    plain, weighted = adapted(), adapted()
    fw = FisherWeightedLora(weighted, strength=0.0, warmup_steps=3)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (plain, weighted)]
    for step in range(50):
        batch = batches(step % 4 + 1)[-1]
        for model, optimizer in zip((plain, weighted), optimizers, strict=True):
            loss_of(model, batch, 1).backward()
            if model is weighted:
                fw.step()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_shrinkage_lowers_the_updates_it_is_told_to():
    norms = []
    for normalisation in ("none", "max"):
        model = adapted()
        fw = FisherWeightedLora(model, strength=50.0, warmup_steps=1, normalisation=normalisation)
        loss_of(model, batches(1)[0], 1).backward()
        fw.step()
        before = delta_norms(fw.pairs)
        model.zero_grad()
        fw._add_shrinkage_gradients()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 1e-4 * parameter.grad
        norms.append((delta_norms(fw.pairs) / before, list(fw.importance().values())))
    assert (norms[0][0] < 1).all()
    top = norms[1][1].index(1.0)
    assert norms[1][0][top] == pytest.approx(1.0, abs=1e-12)
    assert (norms[1][0] < 1).sum() == 2


def test_gradient_checked_penalty_and_closed_form():
    torch.manual_seed(3)
    A = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def penalty(A, B):
        return shrinkage_penalty([(A[0], B[0]), (A[1], B[1])], [2.0, 0.5], weights, 0.1)

    assert torch.autograd.gradcheck(penalty, (A, B))
    expected = torch.autograd.grad(penalty(A, B), (A, B))
    coefficients = 0.1 * weights * torch.tensor([4.0, 0.25], dtype=torch.float64)
    gradient_A, gradient_B, value = shrinkage_gradients(A, B, coefficients)
    torch.testing.assert_close((gradient_A, gradient_B), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value, penalty(A, B).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(squared_delta_norm(A, B, 2.0), (2.0 * B @ A).square().sum(dim=(1, 2)))


def test_delta_norms_are_those_of_the_formed_update():
    pairs = find_adapter_pairs(adapted({"key": 3}))
    expected = [torch.linalg.matrix_norm(pair.module.get_delta_weight("default")) for pair in pairs]
    torch.testing.assert_close(delta_norms(pairs), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [("sum", [0.1, 0.3, 0.6]), ("max", [1 / 6, 0.5, 1.0]), ("mean", [0.15, 0.45, 0.9]), ("none", [0.0, 0.0, 0.0])],
)
def test_importance_by_hand(normalisation, expected):
    fisher = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(normalise_importance(fisher, normalisation), torch.tensor(expected, dtype=torch.float64))


def test_importance_refuses_what_is_no_importance():
    with pytest.raises(ValueError, match="zero everywhere"):
        normalise_importance(torch.zeros(2))
    with pytest.raises(ValueError, match="negative or non-finite"):
        normalise_importance(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="'softmax'"):
        normalise_importance(torch.ones(2), "softmax")


def test_bf16_gradients_are_multiplied_in_float32():
    torch.manual_seed(0)
    recorder = GradientRecorder([nn.Linear(64, 32)])
    X, G = torch.randn(500, 64).bfloat16(), torch.randn(500, 32).bfloat16()
    recorder.observe(0, X, G)
    expected = (G.double().T @ X.double()).square().sum()
    torch.testing.assert_close(recorder.take_squared_norms()[0].double(), expected, rtol=1e-5, atol=0)


def test_accumulator_by_hand():
    fisher = FisherAccumulator(2, 0.5, dtype=torch.float64)
    fisher.update(torch.tensor([4.0, 0.0]))
    fisher.update(torch.tensor([2.0, 8.0]))
    assert fisher.values.tolist() == [2.0, 4.0] and fisher.steps == 2


def test_mistakes_are_named():
    model = adapted()
    fw = FisherWeightedLora(model, warmup_steps=1)
    with pytest.raises(RuntimeError, match="3 of 3 adapted modules saw no backward pass"):
        fw.step()
    with pytest.raises(RuntimeError, match="frozen after 1 steps; 0 have"):
        fw.importance()
    with pytest.raises(ValueError, match="no adapter named 'default'"):
        FisherWeightedLora(Block())
    with pytest.raises(ValueError, match="`strength` is -1"):
        FisherWeightedLora(model, strength=-1)
    with pytest.raises(ValueError, match="`warmup_steps` is 0"):
        FisherWeightedLora(model, warmup_steps=0)
    with pytest.raises(ValueError, match="`decay` is 1"):
        FisherWeightedLora(model, decay=1)
