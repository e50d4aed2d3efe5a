"""Checked runs to cells of comparable groups.

A *cell* is what methods are compared in: one data set, one backbone, one parameter budget. A *group* is the runs of a
cell that record the same settings but for the seed. Nothing here reads a run's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fwlora.experiment.evaluation.compare.runs import EvaluatedRun, name_cell
from fwlora.experiment.tracking import metrics

# What a group is compared as. The control is uniform shrinkage: the proposed method without its Fisher weighting.
Role = Literal["lora", "adalora", "other", "control", "proposed"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_NAMES: Mapping[str, str] = {
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "control": "uniform shrinkage",
    "proposed": "FW-LoRA",
}
_ROLE_OF_METHOD: Mapping[str, Role] = {"baseline_lora": "lora", "adalora": "adalora"}
_IMPORTANCE = "fw_lora.importance"
_LONGEST_VALUE_IN_LABEL = 24


@dataclass(frozen=True)
class Group:
    """Runs with equal settings, ascending in seed."""

    label: str
    role: Role
    runs: tuple[EvaluatedRun, ...]

    @property
    def settings(self) -> Mapping[str, str]:
        """What all its runs have in common; see :class:`EvaluatedRun`."""
        return self.runs[0].settings

    @property
    def is_proposed(self) -> bool:
        return self.role == "proposed"

    def by_seed(self) -> dict[int, EvaluatedRun]:
        """Its runs by seed."""
        return {run.seed: run for run in self.runs}

    def values(self, metric: str) -> list[float]:
        """One value per run that recorded the metric, in order of seed."""
        return [run.values[metric] for run in self.runs if metric in run.values]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return float(np.mean(values)) if values else None

    def standard_deviation(self, metric: str) -> float | None:
        """Over seeds, with n - 1; None for fewer than two."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Cell:
    """Comparable groups, the proposed method last.

    Attributes:
        name: for people: ``glue/cola, roberta-base, 0.2 %``.
        condition: the name as part of a file name.
        data, model, budget: the parts of the name.
        primary: the task metric that is compared.
    """

    name: str
    condition: str
    data: str
    model: str
    budget: str
    primary: str
    groups: tuple[Group, ...]

    @property
    def primary_eval_name(self) -> str:
        return metrics.eval_name(self.primary)

    @property
    def runs(self) -> list[EvaluatedRun]:
        """All runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def read(self, run: EvaluatedRun) -> float:
        """The compared value of a run."""
        return run.values[self.primary_eval_name]

    def pairs(self) -> Iterator[tuple[Group, Group]]:
        """Each proposed group with each group of another role."""
        for first in self.groups:
            if first.is_proposed:
                yield from ((first, other) for other in self.groups if not other.is_proposed)


def role_of(run: EvaluatedRun) -> Role:
    """The role that a run's settings give it."""
    if run.method.startswith("proposed"):
        return "control" if run.settings.get(_IMPORTANCE) == '"none"' else "proposed"
    return _ROLE_OF_METHOD.get(run.method, "other")


def group_cells(runs: Sequence[EvaluatedRun]) -> list[Cell]:
    """Cells in order of data set, model and budget, each with its groups; independent of the order of ``runs``."""
    keys = sorted({run.cell_key for run in runs}, key=lambda key: (*key[:3], budget_value(key[3]), key[3]))
    shown = _name_data({key[0] for key in keys})
    plain = [name_cell((shown[key[0]], *key[1:]), with_pretrained_id=False) for key in keys]
    cells: list[Cell] = []
    for key, name in zip(keys, plain, strict=True):
        data, model, budget = shown[key[0]], key[1], key[3]
        name = name if plain.count(name) == 1 else name_cell((data, *key[1:]), with_pretrained_id=True)
        members = [run for run in runs if run.cell_key == key]
        condition = re.sub(r"[^A-Za-z0-9.]+", "-", name.replace(" %", "pct")).strip("-.")
        taken = sum(cell.condition == condition for cell in cells)
        condition = f"{condition}-{taken + 1}" if taken else condition
        cells.append(Cell(name, condition, data, model, budget, members[0].primary, _group_runs(members)))
    return cells


def _name_data(names: Iterable[str]) -> dict[str, str]:
    """Data sets as displayed: of a folder's path the last two parts, all of it where that is ambiguous."""
    short = {name: "/".join(Path(name).parts[-2:]) for name in names}
    ends = list(short.values())
    return {name: end if ends.count(end) == 1 else name for name, end in short.items()}


def budget_value(budget: str) -> float:
    """The number in ``0.2 %`` or ``rank 8``; 0 where there is none."""
    return float(re.sub(r"[^0-9.]", "", budget) or 0)


def shorten_setting(value: str | None) -> str:
    """A setting's JSON text for a label: a long one by its hash, a missing one as ``unset``."""
    if value is None:
        return "unset"
    text = value.strip('"')
    return text if len(text) <= _LONGEST_VALUE_IN_LABEL else "#" + hashlib.sha256(text.encode()).hexdigest()[:6]


def _group_runs(runs: Sequence[EvaluatedRun]) -> tuple[Group, ...]:
    by_settings: dict[tuple[Any, ...], list[EvaluatedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_settings.setdefault(tuple(run.settings.items()), []).append(run)
    groups = []
    for members in by_settings.values():
        role, method = role_of(members[0]), members[0].method
        firsts = [each[0] for each in by_settings.values()]
        alike = [run.settings for run in firsts if (role_of(run), run.method) == (role, method)]
        differing = sorted(
            key for key in {key for settings in alike for key in settings} if len({v.get(key) for v in alike}) > 1
        )
        parts = [f"{key}={shorten_setting(members[0].settings.get(key))}" for key in differing]
        label = ROLE_NAMES.get(role, json.dumps(method).strip('"')) + (f" ({', '.join(parts)})" if parts else "")
        groups.append(Group(label, role, tuple(members)))
    return tuple(sorted(groups, key=lambda group: (ROLES.index(group.role), group.label)))
