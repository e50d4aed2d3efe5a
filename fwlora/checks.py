"""Adapters that FW-LoRA cannot measure, shrink or reallocate right; each is refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fwlora.adapters import AdapterPair
from fwlora.config import FwLoraConfig
from fwlora.estimators import count_processes
from fwlora.options import FisherWeighting
from fwlora.targets import describe_mismatch

# Starts of A and B that leave the base weight W as it is; the others subtract s B0 A0 from it.
STARTS_WITHOUT_A_CHANGE_OF_W = ("gaussian", "eva", "orthogonal")


def choose_options(config: Any, options: FisherWeighting | None) -> FisherWeighting:
    """Return a copy of the options to use: those given, those of a :class:`fwlora.FwLoraConfig`, or the defaults.

    Raises:
        ValueError: no options, or options outside their range.
    """
    if options is None:
        options = config if isinstance(config, FwLoraConfig) else FisherWeighting()
    if not isinstance(options, FisherWeighting):
        raise ValueError(f"`options` is a {type(options).__name__}; give a FisherWeighting, or None for the config's")
    options.check()
    return options.fisher_weighting()


def check_adapter(pairs: Sequence[AdapterPair], config: Any) -> None:
    """Check that an adapter is LoRA that can be trained, whose update starts at the pretrained weights, as planned.

    Args:
        pairs: the matrices with the adapter.
        config: PEFT's configuration of it; None where no PeftModel is around the model.

    Raises:
        ValueError: AdaLoRA, a frozen adapter, a start that changes W, an unsolved budget, ranks other than planned.
    """
    name = pairs[0].adapter_name
    if any(pair.E is not None for pair in pairs):
        raise ValueError(f"adapter {name!r} of `model` is an AdaLoRA adapter; FW-LoRA weights LoRA adapters")
    if not any(pair.B.requires_grad for pair in pairs):
        raise ValueError(
            f"adapter {name!r} of `model` is frozen; load it with is_trainable=True, or activate it with "
            f"model.set_adapter({name!r})"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS_WITHOUT_A_CHANGE_OF_W:
        raise ValueError(
            f"`init_lora_weights` is {start!r}, which subtracts s B0 A0 from the pretrained weight: the update is then "
            "s (B A - B0 A0), and shrinking s B A would move the model away from its start; use one of True, "
            f"{', '.join(map(repr, STARTS_WITHOUT_A_CHANGE_OF_W))}"
        )
    if not isinstance(config, FwLoraConfig) or config.budget_percent is None:
        return
    if not config.rank_pattern:
        raise ValueError(
            f"`budget_percent` is {config.budget_percent}, but its ranks were never solved: build the config with "
            "FwLoraConfig.for_model(base, budget_percent=...) before get_peft_model"
        )
    mismatch = describe_mismatch(config, {pair.name: pair.rank for pair in pairs})
    if mismatch:
        raise ValueError(
            f"the adapter is not the one that FwLoraConfig.for_model planned for this budget: {mismatch}; plan for the "
            "very model that is adapted, and leave the config's matrices and ranks as they are"
        )


def check_reallocation(pairs: Sequence[AdapterPair], config: Any) -> None:
    """Check that an adapter can lose matrices and still be loaded by PEFT with all that was trained.

    Raises:
        ValueError: several processes, or trained biases, which a matrix of rank 0 could not keep.
    """
    if count_processes() > 1:
        raise ValueError(
            "`allocation` is 'reallocate' with several processes, but data-parallel training fixes the parameters' "
            "shapes when it wraps the model; use allocation='shrink'"
        )
    bias = getattr(config, "bias", "none")
    layers: list[Any] = [pair.module for pair in pairs]
    if bias != "none" or any(layer.lora_bias.get(pairs[0].adapter_name) for layer in layers):
        option = f"`bias` is {bias!r}" if bias != "none" else "`lora_bias` is True"
        raise ValueError(
            f"`allocation` is 'reallocate' and {option}, but PEFT does not load the trained bias of a matrix whose "
            "rank becomes 0; train no bias, or use allocation='shrink'"
        )
