"""The seam for methods: everything that the harness reads from one, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from fwlora.experiment.errors import UserError
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.settings.base import SettingsNode

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fwlora.adapters import AdapterPair
    from fwlora.config import RankPlan
    from fwlora.estimators import PassEstimator
    from fwlora.experiment.fused.compiled import Kernels
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
        style: number of its color and marker in figures, the same in every figure.
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
    """What a training loop calls; its defaults are plain LoRA, or a head alone where there is no pair.

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

    def use_kernels(self, kernels: Kernels) -> None:
        """Take compiled kernels for the method's own work, before the first step; a method may do without."""

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

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the trained adapter into a folder, in a form that PEFT and transformers load; the head alone whole."""
        from fwlora.adapters import save_adapter

        # No run trains embeddings, for which PEFT would look the base model up.
        save_adapter(model, folder, **({"save_embedding_layers": False} if self.pairs else {}))

    def state_dict(self) -> JsonObject:
        """Return what a resume needs beside the weights of the model and the state of the optimizer."""
        return {}

    def load_state_dict(self, state: JsonMapping) -> None:
        """Continue where :meth:`state_dict` was taken."""


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
    claimed_settings: ClassVar[JsonMapping] = {}
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


def peft_options(run: RunSettings, head_modules: Sequence[str]) -> JsonObject:
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
    """Return all registered methods by name, the built-in ones first."""
    modules = [f"fwlora.experiment.methods.{module}" for module in _BUILT_IN]
    for module in modules:
        import_module(module)
    # A built-in method that was imported alone is registered before the others.
    order = {module: index for index, module in enumerate(modules)}
    return dict(sorted(_METHODS.items(), key=lambda item: order.get(type(item[1]).__module__, len(order))))


def method_nodes() -> dict[str, MethodSpec]:
    """Return the methods that have settings of their own, by the key of their node in run files."""
    return {spec.settings_node: spec for spec in known_methods().values() if spec.settings_node}


def find_method(name: str) -> MethodSpec | None:
    """Return the method that ``run.method`` names; None for one that is not registered in this process."""
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
