"""The seam for methods: everything that the harness reads from one, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.base import SettingsNode

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fwlora.config import RankPlan
    from fwlora.experiment.settings.schema import RunSettings
    from fwlora.methods import Method

# On which side of a comparison a variant stands: proposed ones are compared with all others.
Side = Literal["proposed", "control", "baseline"]

_BUILT_IN = ("lora", "adalora", "fw_lora")
_METHODS: dict[str, MethodSpec] = {}


@dataclass(frozen=True)
class Variant:
    """What a run of a method is compared as.

    Attributes:
        role: the name that claims use, such as ``lora`` or ``proposed``.
        label: the name that tables and figures show.
        side: the proposed method, its control, or a baseline.
        style: number of its colour and marker in figures, the same in every figure.
    """

    role: str
    label: str
    side: Side
    style: int


class MethodSpec(ABC):
    """A method of the experiment program: a subclass and one call of :func:`register_method` add one.

    Attributes:
        name: the value of ``run.method`` in run files.
        settings_node: key of the node in run files that only this method reads; None for a method without settings.
        Settings: class of that node, with defaults; fields marked by ``Searchable`` can be searched.
        variants: everything that :meth:`variant` returns; claims can name their roles.
        claimed_settings: dotted keys and values of the variant that claims are about; others are not judged.
        strength_settings: dotted keys that must agree over pooled cells, and between the method and its control.
        control_settings: further dotted keys that must agree between the method and its control, seed by seed.
    """

    name: ClassVar[str]
    settings_node: ClassVar[str | None] = None
    Settings: ClassVar[type[SettingsNode] | None] = None
    variants: ClassVar[tuple[Variant, ...]] = ()
    claimed_settings: ClassVar[Mapping[str, Any]] = {}
    strength_settings: ClassVar[tuple[str, ...]] = ()
    control_settings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def variant(self, run: RunSettings) -> Variant:
        """Return what a run with these settings is compared as."""

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        plan: RankPlan,
        run: RunSettings,
        *,
        head_modules: Sequence[str],
        total_steps: int,
        device: torch.device,
    ) -> tuple[nn.Module, Method]:
        """Adapt a model.

        Args:
            model: encoder and head on the CPU, all parameters trainable.
            plan: a rank for every targeted matrix, and the budget in parameters.
            run: the settings.
            head_modules: names of the modules that make up the head, to be trained in full.
            total_steps: optimizer steps of the training to come.
            device: where the model is trained.

        Returns:
            The adapted model on the device, and what the training loop calls.

        Raises:
            UserError: a schedule that does not fit ``total_steps``.
        """

    def check(self, run: RunSettings, total_steps: int) -> None:  # noqa: B027 - a method without a schedule fits any run
        """Check that the method's schedule fits a run; log a warning where it barely does.

        Args:
            run: the settings.
            total_steps: optimizer steps of the whole run.

        Raises:
            UserError: it does not fit.
        """

    def rescale(self, run: RunSettings, steps: int, new_steps: int) -> RunSettings:
        """Keep the schedule's share of the steps in a run of another length, such as a trial of a search.

        Args:
            run: the settings of the run of ``steps`` optimizer steps.
            steps: optimizer steps that the schedule is meant for.
            new_steps: optimizer steps of the other run, at least 2.

        Raises:
            ValueError: the schedule does not fit ``steps``.
        """
        return run

    def limit_to_trial(self, run: RunSettings) -> RunSettings:
        """Fit the schedule into the two steps of trial mode, so that each of its phases is reached."""
        return run

    def changes_ranks(self, run: RunSettings) -> bool:
        """Return whether the method moves ranks between modules while it trains."""
        return False


def peft_options(run: RunSettings, head_modules: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that every method hands to PEFT: scaling, dropout, head and kind of task."""
    lora = run.model.lora
    return {
        "scaling": lora.scaling,
        "dropout": lora.dropout,
        "head_modules": list(head_modules),
        "task_type": "SEQ_CLS",
    }


def register_method(spec: MethodSpec) -> None:
    """Add a method.

    Raises:
        ValueError: another method has its name or its settings node, or one of node and class is missing.
    """
    if (spec.settings_node is None) != (spec.Settings is None):
        raise ValueError(f"{spec.name}: give both `settings_node` and `Settings`, or neither")
    if _METHODS.get(spec.name, spec) is not spec:
        raise ValueError(f"`name` {spec.name!r} is taken by {type(_METHODS[spec.name]).__name__}; choose another")
    for other in _METHODS.values():
        if other is not spec and spec.settings_node and other.settings_node == spec.settings_node:
            raise ValueError(f"`settings_node` {spec.settings_node!r} is taken by {other.name}; choose another")
    _METHODS[spec.name] = spec


def unregister_method(name: str) -> None:
    """Remove a method, if it is registered."""
    _METHODS.pop(name, None)


def known_methods() -> dict[str, MethodSpec]:
    """All registered methods by name, the built-in ones first."""
    for module in _BUILT_IN:
        import_module(f"fwlora.experiment.methods.{module}")
    return dict(_METHODS)


def method_nodes() -> dict[str, MethodSpec]:
    """Return the methods that have settings of their own, by the key of their node in run files."""
    return {spec.settings_node: spec for spec in known_methods().values() if spec.settings_node}


def find_method(name: str) -> MethodSpec | None:
    """The method that ``run.method`` names; None for one that is not registered in this process."""
    return known_methods().get(name)


def get_method(name: str) -> MethodSpec:
    """Return the method that ``run.method`` names.

    Raises:
        UserError: it is not registered in this process.
    """
    spec = find_method(name)
    if spec is None:
        raise UserError(f"run.method = {name!r} is not registered; known: {', '.join(known_methods())}")
    return spec
