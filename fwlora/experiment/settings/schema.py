"""Settings as typed objects: names, types, ranges and units of everything that can be set."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fwlora.experiment.engine.options import TrainingOptions
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods.base import find_method, known_methods, method_nodes
from fwlora.experiment.settings.base import Fraction, Searchable, Seed, SettingsNode, find_searchable
from fwlora.experiment.settings.modes import known_modes
from fwlora.experiment.settings.search_space import SearchSettings
from fwlora.experiment.tracking import DEFAULT_TRACKER, TrackerSettings, known_trackers

FORBIDDEN_IN_RUN_IDS = set("\":<>|*?/\\\r\n#%;,'")
# Figures add up to 80 bytes to it, and file systems take names of 255.
LONGEST_RUN_ID = 128
RESERVED_RUN_IDS = {".", "..", "comparison"}


class LoraSettings(SettingsNode):
    """``model.lora``.

    Attributes:
        enabled: false trains the classification head alone.
        rank: r, of every adapter where ranks are fixed, and part of the scaling.
        alpha: the numerator of the scaling.
        dropout: probability that an input of an adapter is dropped.
        target_modules: roles (query, key, value, intermediate, output) or ends of module paths.
    """

    enabled: bool
    rank: Annotated[int, Field(ge=1), Searchable("lora_rank")]
    alpha: Annotated[float, Field(gt=0), Searchable("lora_alpha")]
    dropout: Annotated[Fraction, Searchable("lora_dropout")]
    target_modules: list[str] = Field(min_length=1)

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank of every method's updates s B A."""
        return self.alpha / self.rank


class ModelSettings(SettingsNode):
    """``model``.

    Attributes:
        name: in tables and figures.
        pretrained_id: a Hub id, a folder, or ``package:<module>/<folder>``.
        revision: pins a Hub model to a commit.
        parameter_budget_percent: adapter parameters, in per cent of the encoder's.
        budget_mode: whether the budget or ``lora.rank`` fixes the ranks.
        lora: of the adapters.
    """

    name: str
    pretrained_id: str = Field(min_length=1)
    revision: str | None = None
    parameter_budget_percent: float = Field(gt=0, le=100)
    budget_mode: Literal["budget", "rank"] = "budget"
    lora: LoraSettings

    @property
    def ranks_are_fixed(self) -> bool:
        """Whether every matrix gets ``lora.rank``, whatever the budget is."""
        return self.budget_mode == "rank"


class DatasetSettings(SettingsNode):
    """``dataset``.

    Attributes:
        name: ``acceptability``, ``glue``, another Hub id, or a folder.
        subset: a configuration of the data set, such as ``cola``.
        revision: pins a Hub data set to a commit.
        split: that is trained on.
        eval_split: that is evaluated after every epoch.
        max_length: tokens of an example, special ones included.
        padding: ``max_length``: to that width where ``engine.fast`` is false; ``longest``: never.
        truncation: whether longer examples are cut, or an error.
        text_columns: one or two; None for GLUE's own, else the usual names.
        label_column: of the classes or numbers.
        metric: the task metric that runs are compared by; None for GLUE's own, else accuracy. A metric of numbers makes
            the task a regression.
        label_names: names of integer classes in ascending order, or text classes in the order of their numbers; None
            for those of the data.
        train_examples: a fixed random part, the same for every training seed; None for all.
        eval_examples: likewise.
        subset_seed: of the draws of those parts.
    """

    name: str = Field(min_length=1)
    subset: str | None = None
    revision: str | None = None
    split: str
    eval_split: str
    max_length: int = Field(ge=2)
    padding: Literal["max_length", "longest"]
    truncation: bool
    text_columns: list[str] | None = Field(default=None, min_length=1, max_length=2)
    label_column: str = "label"
    metric: str | None = None
    label_names: list[str] | None = Field(default=None, min_length=2)
    train_examples: int | None = Field(default=None, ge=1)
    eval_examples: int | None = Field(default=None, ge=1)
    subset_seed: Seed = 0

    @field_validator("metric")
    @classmethod
    def _is_registered(cls, name: str | None) -> str | None:
        if name is not None:
            # Imports NumPy, which settings do without.
            from fwlora.experiment.tracking.task_metrics import TASK_METRICS

            if name not in TASK_METRICS:
                known = ", ".join(TASK_METRICS)
                raise PydanticCustomError("unknown_metric", "Input should be one of {known}", {"known": known})
        return name

    @field_validator("label_names")
    @classmethod
    def _are_distinct(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (len(set(names)) < len(names) or not all(names)):
            raise PydanticCustomError("repeated_names", "Input should be distinct names, none of them empty")
        return names


class TrainingSettings(SettingsNode):
    """``training``.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples per micro-batch, over all processes.
        learning_rate: peak of the schedule.
        weight_decay: of matrices; biases and normalization have none.
        optimizer: a name of :mod:`fwlora.experiment.engine.optimizer`.
        lr_scheduler: a name of ``transformers.optimization.get_scheduler``.
        lr_scheduler_options: its own options.
        warmup_ratio: share of the steps in which the learning rate rises; it is not the Fisher warm-up.
        gradient_accumulation_steps: micro-batches per optimizer step.
        max_gradient_norm: gradients are clipped to this L2 norm; None clips nothing.
        mixed_precision: ``bf16`` where the machine multiplies it faster than float32, else as with ``fp32``.
        seed: of head, adapters, order of examples and dropout.
    """

    epochs: Annotated[int, Field(ge=1), Searchable()]
    batch_size: Annotated[int, Field(ge=1), Searchable()]
    learning_rate: Annotated[float, Field(gt=0), Searchable()]
    weight_decay: Annotated[float, Field(ge=0), Searchable()]
    optimizer: str
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ]  # fmt: skip
    lr_scheduler_options: dict[str, int | float | str] = Field(default_factory=dict)
    warmup_ratio: Annotated[Fraction, Searchable()]
    gradient_accumulation_steps: int = Field(ge=1)
    max_gradient_norm: float | None = Field(default=TrainingOptions.max_gradient_norm, gt=0)
    mixed_precision: Literal["bf16", "fp32"]
    seed: Seed

    @field_validator("optimizer")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name != TrainingOptions.optimizer:
            # Imports torch, which the default does without.
            from fwlora.experiment.engine.optimizer import known_optimizers

            if name not in known_optimizers():
                known = ", ".join(known_optimizers())
                raise PydanticCustomError("unknown_optimizer", "Input should be one of {known}", {"known": known})
        return name

    @property
    def options(self) -> TrainingOptions:
        """The same for the training engine."""
        return TrainingOptions(**{option.name: getattr(self, option.name) for option in fields(TrainingOptions)})

    def steps_per_epoch(self, examples: int) -> int:
        """Return the optimizer steps of one pass over ``examples``."""
        return self.options.steps_per_epoch(examples)

    def total_steps(self, examples: int) -> int:
        """Return the optimizer steps of the whole training."""
        return self.options.total_steps(examples)


class RunSettings(SettingsNode):
    """The ``run`` node: everything that defines a run. Two runs with equal nodes but for id and seed are replicates.

    The nodes that single methods read come from the registry, see :func:`run_settings_class`.
    """

    run_id: str = Field(min_length=1)
    method: str
    model: ModelSettings
    dataset: DatasetSettings
    training: TrainingSettings
    optuna: SearchSettings

    @field_validator("method")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if find_method(name) is None:
            known = ", ".join(known_methods())
            raise PydanticCustomError("unknown_method", "Input should be one of {known}", {"known": known})
        return name

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = []
        spec = find_method(self.method)
        if spec is not None and spec.settings_node and self.method_settings is None:
            problems.append(f"method {self.method} needs the node `{spec.settings_node}`")
        if len(self.run_id.encode()) > LONGEST_RUN_ID:
            problems.append(
                f"`run_id` has {len(self.run_id.encode())} bytes; a file's name takes {LONGEST_RUN_ID} of it"
            )
        if bad := sorted(FORBIDDEN_IN_RUN_IDS & set(self.run_id)):
            problems.append(f"`run_id` holds {bad}, which cannot stand in a folder name")
        if self.run_id in RESERVED_RUN_IDS:
            problems.append(f"`run_id` {self.run_id!r} is taken: it names a folder of the results")
        problems += _find_search_space_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def method_settings(self) -> SettingsNode | None:
        """The node that only this run's method reads; None of a method without one."""
        spec = find_method(self.method)
        return getattr(self, spec.settings_node, None) if spec is not None and spec.settings_node else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the class's nodes, since the class itself is made at run time; figures are drawn in processes."""
        return _restore_run, (self.__dict__, self.model_fields_set)

    def with_values(self, values: JsonMapping) -> Self:
        """Put searched values in their places and validate again.

        Args:
            values: name in the search space -> value.
        """
        node, paths = self.model_dump(), searchable_paths()
        for name, value in values.items():
            *parents, key = paths[name]
            target = node
            for parent in parents:
                target = target[parent]
            target[key] = value
        return self.model_validate(node)

    def with_method_settings(self, **changes: Any) -> Self:
        """Change fields of the node that only this run's method reads, without validation."""
        spec, settings = find_method(self.method), self.method_settings
        if spec is None or spec.settings_node is None or settings is None:
            raise ValueError(f"method {self.method!r} has no settings of its own to change")
        return self.model_copy(update={spec.settings_node: settings.model_copy(update=changes)})


def run_settings_class() -> type[RunSettings]:
    """Return :class:`RunSettings` with the node of every registered method; a run has those of its own method alone."""
    return _add_nodes(tuple((node, spec.Settings) for node, spec in method_nodes().items()))


@cache
def _add_nodes(nodes: tuple[tuple[str, type[SettingsNode]], ...]) -> type[RunSettings]:
    fields: JsonObject = {name: (node | None, None) for name, node in nodes if name is not None and node is not None}
    return create_model("RunSettings", __base__=RunSettings, __module__=__name__, **fields)


def _restore_run(values: JsonObject, fields_set: set[str]) -> RunSettings:
    return run_settings_class().model_construct(fields_set, **values)


def searchable_paths() -> dict[str, tuple[str, ...]]:
    """Return what a search may vary: the name in ``optuna.search_space`` -> path of the value in the run node."""
    return dict(find_searchable(run_settings_class()))


def _find_search_space_problems(run: RunSettings) -> list[str]:
    """Find dimensions that the run does not read, and bounds that the setting itself refuses."""
    problems, paths = [], searchable_paths()
    for name, distribution in run.optuna.search_space.items():
        path = paths.get(name)
        if path is None:
            problems.append(f"`optuna.search_space.{name}` is not searchable; known: {', '.join(sorted(paths))}")
            continue
        section = getattr(run, path[0])
        if section is None:
            owner = method_nodes()[path[0]].name
            problems.append(f"`optuna.search_space.{name}` belongs to {owner}, not to {run.method}")
            continue
        for attribute in path[1:-1]:
            section = getattr(section, attribute)
        for value in distribution.bounds:
            try:
                type(section).model_validate({**section.model_dump(), path[-1]: value})
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                problems.append(
                    f"`optuna.search_space.{name}` reaches {value!r}, which `{'.'.join(path)}` refuses: {reason}"
                )
    return problems


class EngineSettings(SettingsNode):
    """``engine``.

    Attributes:
        fast: false does what run files literally say: every batch padded to ``max_length``, by the model's own forward
            pass.
        batches: ``random``, or ``by_length`` for batches of examples of like length, which need little padding where no
            compiled kernels leave it out; on CoLA they cost accuracy, see ``benchmarks/README.md``.
        cuda_graphs: on a GPU, capture the pass of every batch shape and replay it.
        compiled: on a CPU, compile kernels for all of a layer but its products; needs a C compiler, and does without
            where there is none.
        precision: ``auto`` takes bf16 where the run allows it and products of its model are faster in it.
        device: ``auto`` takes a GPU where there is one.
    """

    fast: bool = True
    batches: Literal["random", "by_length"] = "random"
    cuda_graphs: bool = False
    compiled: bool = True
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ProgramSettings(SettingsNode):
    """All settings of one invocation.

    Attributes:
        run: what defines the run.
        results_dir: where logs, adapters and the tracker's files go, under the run's id.
        mode: a registered one, see :mod:`fwlora.experiment.settings.modes`.
        engine: how to compute.
        tracker: the name of what records the run.
        resume: ``auto`` continues what an earlier attempt at the run has left, and leaves a finished run as it is;
            ``never`` starts anew.

    The node of the chosen tracker comes from the registry, see :func:`program_settings_class`.
    """

    run: RunSettings
    results_dir: str = ".research/results"
    mode: str
    engine: EngineSettings = Field(default_factory=EngineSettings)
    # Not recorded: a record is found in its tracker alone.
    tracker: str = Field(default=DEFAULT_TRACKER, exclude=True)
    resume: Literal["auto", "never"] = "auto"

    @field_validator("mode")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in known_modes():
            known = ", ".join(known_modes())
            raise PydanticCustomError("unknown_mode", "Input should be one of {known}", {"known": known})
        return name

    @field_validator("tracker")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in known_trackers():
            known = ", ".join(known_trackers())
            raise PydanticCustomError("unknown_tracker", "Input should be one of {known}", {"known": known})
        return name

    @property
    def tracker_settings(self) -> TrackerSettings:
        """The node of the chosen tracker."""
        node: TrackerSettings = getattr(self, self.tracker)
        return node

    def as_record(self) -> JsonObject:
        """Return plain values for the run's record."""
        record = self.model_dump()
        engine = record.pop("engine")
        del record["resume"]  # does not define the run
        return {**record, "engine": engine}  # after the tracker's node, as in the records that there are


def program_settings_class(tracker: str = DEFAULT_TRACKER) -> type[ProgramSettings]:
    """Return :class:`ProgramSettings` with the node of a tracker, whose run has the node of every registered method.

    Args:
        tracker: name of the tracker; an unknown one adds no node.
    """
    return _complete_program(run_settings_class(), tracker, known_trackers().get(tracker))


@cache
def _complete_program(
    run_class: type[RunSettings], tracker: str, node: type[TrackerSettings] | None
) -> type[ProgramSettings]:
    fields: JsonObject = {"run": (run_class, ...), **({} if node is None else {tracker: (node, ...)})}
    return create_model("ProgramSettings", __base__=ProgramSettings, __module__=__name__, **fields)
