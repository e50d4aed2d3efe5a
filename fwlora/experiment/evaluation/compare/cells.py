"""Group checked runs into cells, and the runs of a cell by their settings.

A *cell* is what methods are compared in: one data set, one backbone, one parameter budget. A *group* is the runs of a
cell that record the same settings except for the seed. Names of runs do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fwlora.experiment.evaluation.compare.runs import Budget, EvaluatedRun
from fwlora.experiment.evaluation.compare.settings import list_distinct, shorten_setting
from fwlora.experiment.json_types import JsonMapping
from fwlora.experiment.methods import Side, Variant
from fwlora.experiment.tracking import metrics, task_metrics

_SIDES: tuple[Side, ...] = ("baseline", "control", "proposed")


@dataclass(frozen=True)
class Group:
    """Runs with equal settings, ascending in seed.

    Attributes:
        label: the variant's label, with the settings that tell it from other groups of the variant.
        variant: what the runs are compared as.
        runs: at least one.
    """

    label: str
    variant: Variant
    runs: tuple[EvaluatedRun, ...]

    @property
    def role(self) -> str:
        """The name that claims use for the variant."""
        return self.variant.role

    @property
    def settings(self) -> JsonMapping:
        """What all its runs have in common; see :class:`EvaluatedRun`."""
        return self.runs[0].settings

    @property
    def is_proposed(self) -> bool:
        """Whether it is compared with all groups of other sides."""
        return self.variant.side == "proposed"

    @property
    def is_control(self) -> bool:
        """Whether it is the control of a proposed method."""
        return self.variant.side == "control"

    def by_seed(self) -> dict[int, EvaluatedRun]:
        """Return its runs by seed."""
        return {run.seed: run for run in self.runs}

    def values(self, metric: str) -> list[float]:
        """List the values of the runs that recorded the metric, in order of seed."""
        return [run.values[metric] for run in self.runs if metric in run.values]

    def mean(self, metric: str) -> float | None:
        """Return the mean over seeds; None where no run recorded the metric."""
        values = self.values(metric)
        return float(np.mean(values)) if values else None

    def standard_deviation(self, metric: str) -> float | None:
        """Return the standard deviation over seeds, with n - 1; None for fewer than two."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class PairChoice:
    """Which pairs of methods of a cell are compared: each proposed one with each other one, and all with a reference.

    Attributes:
        reference: role of the method that every other one is compared with.
        every: whether all other pairs are compared, too.
    """

    reference: str = "lora"
    every: bool = False

    def is_usual(self, first: Group, second: Group) -> bool:
        """Return whether the first group is measured against the second, whatever else is compared."""
        if first.is_proposed or second.is_proposed:
            return first.is_proposed and not second.is_proposed
        return second.role == self.reference != first.role


@dataclass(frozen=True)
class Cell:
    """Comparable groups, the proposed method last.

    Attributes:
        name: for people: ``glue/cola, roberta-base, 0.2 %``.
        slug: the name as part of a file name.
        data: data set and subset, as shown.
        model: the model's name.
        pretrained: id of the pretrained weights.
        budget: of adapter parameters.
        primary: the task metric that is compared.
        groups: baselines first, then the control, then the proposed method.
    """

    name: str
    slug: str
    data: str
    model: str
    pretrained: str
    budget: Budget
    primary: str
    groups: tuple[Group, ...]

    @property
    def primary_eval_name(self) -> str:
        """The compared metric's name in values and histories."""
        return metrics.eval_name(self.primary)

    def display_metric(self, name: str, short: bool = False) -> str:
        """Write a task metric's name as it is called with the cell's classes; see :mod:`task_metrics`."""
        return task_metrics.display_metric(name, self.groups[0].runs[0].num_classes, short)

    @property
    def runs(self) -> list[EvaluatedRun]:
        """All runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def read(self, run: EvaluatedRun) -> float:
        """Return the compared value of a run."""
        return run.values[self.primary_eval_name]

    def pairs(self, choice: PairChoice) -> Iterator[tuple[Group, Group]]:
        """Yield the pairs of groups that are compared, the second of each being what the first is measured against."""
        ordered = sorted(enumerate(self.groups), key=lambda item: not item[1].is_proposed)
        for place, first in ordered:
            for other_place, second in enumerate(self.groups):
                rest = choice.every and other_place < place and not choice.is_usual(second, first)
                if rest or choice.is_usual(first, second):
                    yield first, second


def group_cells(runs: Sequence[EvaluatedRun]) -> list[Cell]:
    """Group runs into cells in order of data set, model and budget; the order of ``runs`` does not matter."""
    keys = sorted(
        {run.cell_key for run in runs},
        key=lambda key: (key.data, key.model, key.pretrained, key.budget.number, str(key.budget)),
    )
    shown = _name_data({key.data for key in keys})
    displayed = [replace(key, data=shown[key.data]) for key in keys]
    plain = [key.display() for key in displayed]
    cells: list[Cell] = []
    for key, display, name in zip(keys, displayed, plain, strict=True):
        name = name if plain.count(name) == 1 else display.display(with_pretrained_id=True)
        members = [run for run in runs if run.cell_key == key]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name.replace(" %", "pct")).strip("-.")
        taken = sum(cell.slug == slug for cell in cells)
        slug = f"{slug}-{taken + 1}" if taken else slug
        where = (display.data, key.model, key.pretrained, key.budget)
        cells.append(Cell(name, slug, *where, members[0].primary, _group_runs(members)))
    return cells


def _name_data(names: Iterable[str]) -> dict[str, str]:
    """Shorten data sets' names to the last two parts of their path, where that is not ambiguous."""
    short = {name: "/".join(Path(name).parts[-2:]) for name in names}
    ends = list(short.values())
    return {name: end if ends.count(end) == 1 else name for name, end in short.items()}


def _group_runs(runs: Sequence[EvaluatedRun]) -> tuple[Group, ...]:
    ordered = sorted(runs, key=lambda run: run.seed)
    groups = []
    for settings in list_distinct(run.settings for run in ordered):
        members = tuple(run for run in ordered if run.settings == settings)
        first = members[0]
        kind = (first.variant.role, first.method)
        alike = list_distinct(run.settings for run in ordered if (run.variant.role, run.method) == kind)
        differing = [
            key
            for key in sorted({key for other in alike for key in other})
            if len(list_distinct(other.get(key) for other in alike)) > 1
        ]
        parts = ", ".join(f"{key}={shorten_setting(settings.get(key))}" for key in differing)
        groups.append(Group(first.variant.label + (f" ({parts})" if parts else ""), first.variant, members))
    return tuple(sorted(groups, key=lambda each: (_SIDES.index(each.variant.side), each.variant.style, each.label)))
