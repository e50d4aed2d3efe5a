"""A method as a third party adds it: one class and one call of ``register_method``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field

from fwlora.experiment.errors import UserError
from fwlora.experiment.methods import MethodSpec, Variant, register_method, unregister_method
from fwlora.experiment.methods.base import peft_options
from fwlora.experiment.settings.base import Searchable, SettingsNode


class ToySettings(SettingsNode):
    """The node ``toy``."""

    pause: Annotated[int, Field(ge=0), Searchable("toy_pause")] = 3
    shade: str = "blue"


class ToyMethod(MethodSpec):
    """LoRA with its dropout off, and a pause that the schedule has to fit."""

    name = "toy_method"
    settings_node = "toy"
    Settings = ToySettings
    variants = (Variant("toy", "Toy", "proposed", 5),)

    def variant(self, run):
        """The only one."""
        return self.variants[0]

    def attach(self, model, plan, run, *, head_modules, total_steps, device):
        """Adapters of the planned ranks."""
        from fwlora.adapters import find_adapter_pairs
        from fwlora.config import attach_lora
        from fwlora.experiment.methods.lora import LoraMethod

        options = {**peft_options(run, head_modules), "dropout": 0.0}
        adapted = attach_lora(model, plan.ranks, **options).to(device)
        return adapted, LoraMethod(find_adapter_pairs(adapted))

    def check(self, run, total_steps):
        """The pause must end."""
        if run.toy.pause >= total_steps:
            raise UserError(f"run.toy.pause is {run.toy.pause} of {total_steps} steps; lower it")

    def rescale(self, run, steps, new_steps):
        """Keep the pause's share."""
        return run.with_method_settings(pause=run.toy.pause * new_steps // steps)

    def limit_to_trial(self, run):
        """No pause."""
        return run.with_method_settings(pause=0)


@contextmanager
def registered_toy() -> Iterator[ToyMethod]:
    """The toy method, registered inside the block."""
    spec = ToyMethod()
    register_method(spec)
    try:
        yield spec
    finally:
        unregister_method(spec.name)
