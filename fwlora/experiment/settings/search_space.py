"""The node ``optuna``: how many trials, on what, and the distributions that they draw from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fwlora.experiment.settings.base import Seed, SettingsNode


class _Range(SettingsNode):
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"`low` {self.low} must be below `high` {self.high}")
        return self

    @property
    def bounds(self) -> list[Any]:
        """Values that the setting itself must accept."""
        return [self.low, self.high]


class LogUniform(_Range):
    """A number whose logarithm is uniform between those of ``low`` and ``high``."""

    type: Literal["loguniform"]
    low: float = Field(gt=0)


class Uniform(_Range):
    """A number, uniform between ``low`` and ``high``."""

    type: Literal["uniform"]


class IntRange(_Range):
    """A whole number from ``low`` to ``high`` in steps of ``step``."""

    type: Literal["int"]
    low: int
    high: int
    step: int = Field(default=1, ge=1)


class Categorical(SettingsNode):
    """One of ``choices``."""

    type: Literal["categorical"]
    choices: list[int | float | str | bool] = Field(min_length=1)

    @property
    def bounds(self) -> list[Any]:
        """Values that the setting itself must accept."""
        return list(self.choices)


Distribution = Annotated[LogUniform | Uniform | IntRange | Categorical, Field(discriminator="type")]


class SearchSettings(SettingsNode):
    """``optuna``.

    Attributes:
        n_trials: 0 for no search.
        direction: of the objective, the task metric on the held-out part, of which more is better: ``maximize``.
        search_space: distributions by the names of searchable settings.
        epochs: of every trial, unless they are searched.
        train_examples: that a trial trains on, drawn from the training split without its held-out part; None for all.
        heldout_fraction: of the training split, stratified by class.
        heldout_seed: of its draw.
        seed: of the sampler and of every trial's training.
    """

    n_trials: int = Field(ge=0)
    direction: Literal["maximize"]
    search_space: dict[str, Distribution]
    epochs: int = Field(default=1, ge=1)
    train_examples: int | None = Field(default=8000, ge=1)
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    heldout_seed: Seed = 0
    seed: Seed = 1_000_003
