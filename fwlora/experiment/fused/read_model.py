"""Read a model for the fused forward pass: its linear layers, adapted or not, and its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fwlora.adapters import unwrap


class UnsupportedModelError(ValueError):
    """A model that the fused path does not compute; the message says why."""


@dataclass(frozen=True)
class LinearParts:
    """The parts of a linear layer, adapted or not: y = W x + b, plus the adapter of its pair.

    Attributes:
        weight: W, shape (d_out, d_in).
        bias: b, shape (d_out,), or None.
        adapted: whether the layer carries the active adapter.
        dropout: probability of dropout on the adapter's input.
    """

    weight: Tensor
    bias: Tensor | None
    adapted: bool
    dropout: float


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel; a model without adapters as it is."""
    model = unwrap(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def uses_prompt_learning(model: nn.Module) -> bool:
    """Return whether PEFT puts learnt tokens before the input."""
    model = unwrap(model)
    return isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values())


def module_type(module: nn.Module) -> type[nn.Module]:
    """Return the module's type; of one that PEFT trains in full the type of the wrapped module."""
    return type(module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module)


def read_linear(module: nn.Module) -> LinearParts:
    """Read the parts of ``nn.Linear``, or of PEFT's LoRA or AdaLoRA layer around one.

    Raises:
        UnsupportedModelError: the layer computes anything else: the message says what.
    """
    if type(module) is nn.Linear:
        return LinearParts(module.weight, module.bias, False, 0.0)
    if type(module) not in (LoraLinear, SVDLinear):
        raise UnsupportedModelError(f"a {type(module).__name__} layer")
    layer: Any = module
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    features = {
        f"a {type(base).__name__} under the adapter": type(base) is not nn.Linear or layer.fan_in_fan_out,
        "a merged adapter": layer.merged,
        "a switched-off adapter": layer.disable_adapters,
        "several active adapters": len(active) > 1,
        "a variant of LoRA": any(name in layer.lora_variant for name in active),
        "a bias in the adapter": any(layer.lora_bias.get(name, False) for name in active),
        "adapters in another type than the base": any(
            parameter.dtype != base.weight.dtype
            for name in active
            for container in (layer.lora_A, layer.lora_B)
            for parameter in _parameters_of(container[name])
        ),
    }
    if found := [what for what, present in features.items() if present]:
        raise UnsupportedModelError(", ".join(found))
    if not active:
        return LinearParts(base.weight, base.bias, False, 0.0)
    dropout = layer.lora_dropout[active[0]]
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        raise UnsupportedModelError(f"{type(dropout).__name__} in the adapter")
    return LinearParts(base.weight, base.bias, True, getattr(dropout, "p", 0.0))


def _parameters_of(factor: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [factor] if isinstance(factor, nn.Parameter) else list(factor.parameters())
