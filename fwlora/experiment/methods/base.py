"""The seam for methods: what the harness has to know of one, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from fwlora.adapters import AdapterPair
    from fwlora.estimators import PassEstimator
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


@dataclass(frozen=True)
class AdapterTable:
    """The adapted matrices of a model, one entry per matrix in model order.

    Attributes:
        names: paths of the matrices.
        ranks: in use; 0 for a matrix that lost its adapter.
        importances: I_m, or None where the method has none.
        delta_norms: Frobenius norms of the updates.
    """

    names: list[str]
    ranks: list[int]
    importances: list[float | None]
    delta_norms: list[float]


class Method:
    """What a training loop calls; as it stands, plain LoRA, or a head alone where there is no pair.

    Per optimizer step a loop calls, in this order: :meth:`loss_term` (its value is added to the loss), ``backward()``,
    :meth:`after_backward`, clipping and ``optimizer.step()``, :meth:`after_step` with steps counted from 1,
    ``zero_grad()``. A method overrides what differs from plain LoRA.

    Args:
        pairs: the adapted matrices, in model order.

    Attributes:
        pairs: likewise.
        has_loss_term: whether :meth:`loss_term` adds anything to the loss.
    """

    has_loss_term: bool = False

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        self.pairs = list(pairs)

    @property
    def in_warmup(self) -> bool:
        """Whether importances are being measured."""
        return False

    @property
    def estimator(self) -> PassEstimator | None:
        """The estimator of this step's gradient norms, for forward paths that bypass module hooks.

        They pass it X and G of every matrix, by its place in :attr:`pairs`; None where nothing is measured this way.
        """
        return None

    def loss_term(self) -> Tensor | None:
        """Return a differentiable scalar to add to this step's loss, once per optimizer step; None where none is."""
        return None

    def after_backward(self, optimizer: Optimizer) -> None:
        """Act between ``backward()`` and clipping."""

    def after_step(self, step: int) -> None:
        """Act after ``optimizer.step()`` number ``step``, counted from 1, before ``zero_grad()``."""

    def step_values(self) -> Mapping[str, Tensor | float]:
        """Return what to log of this step: ``penalty``, and what else the method has."""
        return {"penalty": 0.0}

    def active_ranks(self) -> list[int]:
        """Return the ranks in use, one per pair."""
        return [pair.rank for pair in self.pairs]

    def importances(self) -> list[float | None]:
        """Return I_m, one per pair; None where the method has none."""
        return [None] * len(self.pairs)

    def adapter_table(self) -> AdapterTable:
        """Return names, ranks, importances and update norms of the adapted matrices."""
        from fwlora.adapters import delta_norms

        norms = delta_norms(self.pairs).tolist() if self.pairs else []
        return AdapterTable([pair.name for pair in self.pairs], self.active_ranks(), self.importances(), norms)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside the weights of the model and the state of the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""


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
