"""The seam for methods: what the harness has to know of one, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import RunSettings

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
    """A method of the experiment program.

    Attributes:
        name: the value of ``run.method`` in run files.
        variants: everything that :meth:`variant` returns; claims can name their roles.
        claimed_settings: dotted keys and values of the variant that claims are about; others are not judged.
        strength_settings: dotted keys that must agree over pooled cells, and between the method and its control.
        control_settings: further dotted keys that must agree between the method and its control, seed by seed.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[Variant, ...]] = ()
    claimed_settings: ClassVar[Mapping[str, Any]] = {}
    strength_settings: ClassVar[tuple[str, ...]] = ()
    control_settings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def variant(self, run: RunSettings) -> Variant:
        """What a run with these settings is compared as."""

    def changes_ranks(self, run: RunSettings) -> bool:
        """Whether the method moves ranks between modules while it trains."""
        return False


def register_method(spec: MethodSpec) -> None:
    """Add a method.

    Raises:
        ValueError: another method has its name.
    """
    if _METHODS.get(spec.name, spec) is not spec:
        raise ValueError(f"`name` {spec.name!r} is taken by {type(_METHODS[spec.name]).__name__}; choose another")
    _METHODS[spec.name] = spec


def unregister_method(name: str) -> None:
    """Remove a method, if it is registered."""
    _METHODS.pop(name, None)


def known_methods() -> dict[str, MethodSpec]:
    """All registered methods by name, the built-in ones first."""
    for module in _BUILT_IN:
        import_module(f"fwlora.experiment.methods.{module}")
    return dict(_METHODS)


def find_method(name: str) -> MethodSpec | None:
    """The method that ``run.method`` names; None for one that is not registered in this process."""
    return known_methods().get(name)
