"""Optimizers by name."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fwlora.experiment.engine.optimizer import (
    clip_gradients,
    known_optimizers,
    make_adamw,
    make_optimizer,
    register_optimizer,
    unregister_optimizer,
)
from fwlora.experiment.engine.options import TrainingOptions
from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.hydra_arguments import compose_settings
from tests.helpers.paths import CONFIG_DIR

RUN = ["run=comparative-1-roberta-base-110M--CoLA-GLUE", "mode=full"]


def make_sgd(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)


@contextmanager
def registered_sgd():
    register_optimizer("plain_sgd", make_sgd)
    try:
        yield
    finally:
        unregister_optimizer("plain_sgd")


def test_a_registered_optimizer_takes_its_own_step_and_can_be_set_in_run_files():
    options = TrainingOptions(1, 8, 0.5, optimizer="plain_sgd")
    model = nn.Linear(1, 1, bias=False)
    with registered_sgd():
        assert known_optimizers() == ("adamw", "plain_sgd")
        optimizer = make_optimizer(model, options)
        settings = compose_settings([*RUN, "run.training.optimizer=plain_sgd"], CONFIG_DIR, {})
    assert settings.run.training.options.optimizer == "plain_sgd"
    before = model.weight.item()
    model(torch.tensor([[3.0]])).backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 0.5 * 3.0)
    with pytest.raises(ValueError, match="no optimizer 'plain_sgd'; known: adamw"):
        make_optimizer(model, options)


def test_a_name_is_registered_once_and_an_unknown_one_is_a_users_mistake():
    with pytest.raises(ValueError, match="the optimizer name 'adamw' is taken"):
        register_optimizer("adamw", make_sgd)
    register_optimizer("adamw", make_adamw)
    with pytest.raises(UserError, match=r"run\.training\.optimizer = 'adamx': input should be one of adamw"):
        compose_settings([*RUN, "run.training.optimizer=adamx"], CONFIG_DIR, {})


def test_clipping_scales_to_the_joint_norm():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0]), torch.tensor([1.0, 2.0])
    assert clip_gradients(parameters, None).item() == pytest.approx(3.0)
    assert parameters[0].grad.item() == 2.0
    assert clip_gradients(parameters, 1.5).item() == pytest.approx(3.0)
    assert parameters[0].grad.item() == pytest.approx(1.0) and parameters[1].grad.tolist() == pytest.approx([0.5, 1.0])
    assert parameters[2].grad is None
