"""Optimizers by name, learning-rate schedules, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from fwlora.experiment.engine.options import TrainingOptions

# From a model and its options to an optimizer of the parameters that require a gradient.
OptimizerFactory = Callable[[nn.Module, TrainingOptions], Optimizer]


class ScheduleError(ValueError):
    """A learning-rate schedule that cannot be made.

    Attributes:
        name: of the schedule.
        options: likewise.
        learning_rate: its peak.
        reason: what the schedule's own check says.
    """

    def __init__(self, name: str, options: Mapping[str, object], learning_rate: float, reason: str) -> None:
        super().__init__(f"{name} with {dict(options)} and a learning rate of {learning_rate}: {reason}")
        self.name, self.options, self.learning_rate, self.reason = name, dict(options), learning_rate, reason


def make_adamw(model: nn.Module, options: TrainingOptions) -> Optimizer:
    """Make AdamW without decay on biases and normalization, as transformers' Trainer does."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"]))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": options.weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in trainable)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, fused=fused)


_OPTIMIZERS: dict[str, OptimizerFactory] = {"adamw": make_adamw}


def register_optimizer(name: str, factory: OptimizerFactory) -> None:
    """Add an optimizer.

    Raises:
        ValueError: the name is taken.
    """
    if _OPTIMIZERS.setdefault(name, factory) is not factory:
        raise ValueError(f"the optimizer name {name!r} is taken; choose another")


def unregister_optimizer(name: str) -> None:
    """Remove an optimizer, if it is registered."""
    _OPTIMIZERS.pop(name, None)


def known_optimizers() -> tuple[str, ...]:
    """Return the names of all optimizers, the values of ``run.training.optimizer``."""
    return tuple(sorted(_OPTIMIZERS))


def make_optimizer(model: nn.Module, options: TrainingOptions) -> Optimizer:
    """Make the optimizer that ``options.optimizer`` names.

    Raises:
        ValueError: an unknown name.
    """
    if options.optimizer not in _OPTIMIZERS:
        raise ValueError(f"no optimizer {options.optimizer!r}; known: {', '.join(known_optimizers())}")
    return _OPTIMIZERS[options.optimizer](model, options)


def make_schedule(optimizer: Optimizer, options: TrainingOptions, total_steps: int) -> LRScheduler:
    """Make the schedule that ``options.lr_scheduler`` names; see ``transformers.optimization.get_scheduler``.

    Raises:
        ScheduleError: options that the schedule does not take.
    """
    warmup_steps = math.ceil(options.warmup_ratio * total_steps)
    name, own_options = options.lr_scheduler, dict(options.lr_scheduler_options)
    try:
        return get_scheduler(name, optimizer, warmup_steps, total_steps, own_options)
    except (TypeError, ValueError) as error:
        raise ScheduleError(name, own_options, options.learning_rate, str(error)) from None


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to a joint norm of ``max_norm``, where it is not None.

    Returns:
        Their norm before that, shape ().
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
