"""A small adapted model in float64 that tests of the method share, with data and autograd's own weight gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fwlora import FisherWeightedLora, FisherWeighting
from fwlora.adapters import find_adapter_pairs

EXACT = {"estimator": "exact", "fisher_every": 1}


class Block(nn.Module):
    """Two projections of one input and one after them, called twice on purpose; the input needs no gradient."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.query = nn.Linear(5, hidden)
        self.key = nn.Linear(5, hidden)
        self.output = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.query(x)) * self.key(x)
        return self.output(hidden) + self.output(hidden.flip(0))


def make_adapted(
    rank_pattern: dict[str, int] | None = None,
    seed: int = 0,
    targets: tuple[str, ...] = ("query", "key", "output"),
    hidden: int = 4,
) -> nn.Module:
    """The block with LoRA of rank 2 and scaling 3 (or alpha / rank), both factors random, in float64."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), rank_pattern=rank_pattern or {})
    model = get_peft_model(Block(hidden).double(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    return model


Batch = tuple[Tensor, Tensor]


def make_batches(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(7, 5, dtype=torch.float64, generator=generator),
            torch.randn(7, 3, dtype=torch.float64, generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch, parts: int = 1) -> Tensor:
    """Mean squared error of one micro-batch of a step that has ``parts`` of them."""
    return (model(batch[0]) - batch[1]).square().mean() / parts


def squared_gradient_norms(model: nn.Module, loss: Callable[[nn.Module], Tensor], adapter: str = "default") -> Tensor:
    """||grad W||_F^2 per adapted matrix, the independent way: autograd differentiates the base weights of a copy."""
    twin = copy.deepcopy(model)
    weights = [pair.module.base_layer.weight.requires_grad_(True) for pair in find_adapter_pairs(twin, adapter)]
    loss(twin).backward()
    zero = torch.zeros((), dtype=weights[0].dtype)
    return torch.stack([zero if weight.grad is None else weight.grad.square().sum() for weight in weights])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def attach(model: nn.Module, **options) -> FisherWeightedLora:
    """Every step measured exactly, unless told otherwise."""
    return FisherWeightedLora(model, FisherWeighting(**{**EXACT, **options}))


def train(model, fw, optimizer, steps, *, start=0) -> None:
    """Steps on up to four batches in turn; ``fw`` None is plain LoRA."""
    for step in range(start, start + steps):
        loss_of(model, make_batches(step % 4 + 1)[-1]).backward()
        if fw is not None:
            fw.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
