"""Claims as files: a statement, its source, and the contrast and bound that decide it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.claims.measures import Unit, find_measure, known_measures
from fwlora.experiment.evaluation.compare.cells import Cell
from fwlora.experiment.evaluation.compare.contrasts import ImportanceHalf
from fwlora.experiment.evaluation.compare.variants import known_roles
from fwlora.experiment.files import load_model


def _check_role(role: str) -> str:
    if role not in (known := known_roles()):
        raise ValueError(f"unknown role; known: {', '.join(known)}")
    return role


def _check_measure(name: str) -> str:
    find_measure(name)
    return name


Role = Annotated[str, AfterValidator(_check_role)]
MeasureName = Annotated[str, AfterValidator(_check_measure)]
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class ClaimScope(BaseModel):
    """What a claim was made for: a model, by a part of its name, and tasks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)

    def contains(self, cell: Cell) -> bool:
        """Return whether a cell has the model and one of the tasks."""
        return self.model in cell.model and self.task_of(cell) is not None

    def task_of(self, cell: Cell) -> str | None:
        """Return the cell's task; None where it is not one of these."""
        task = cell.data.rpartition("/")[2]
        return task if task in self.tasks else None


class Claim(BaseModel):
    """A file of ``config/claims``; its name is the claim's id.

    Attributes:
        order: place in the report.
        statement: the claim as one sentence.
        source: the part of the specification that makes it.
        quote: its words there.
        measure: name of a measure; see :mod:`fwlora.experiment.evaluation.claims.measures`.
        contrast: weights of roles that sum to 0, such as ``{proposed: 1, lora: -1}``; for ratios, of logarithms.
        at_least: lower bound of the contrast, in the measure's unit; None where ``at_most`` is enough.
        at_most: upper bound of the contrast, in the measure's unit; None where ``at_least`` is enough.
        modules: the half of the modules by importance, for measures that need one.
        budgets: of the cells that the claim covers, in per cent; null: all.
        scope: ``each_cell``: it has to hold in every cell; ``pooled``: in the mean over cells.
        requires: another claim's id, without which this one means nothing; that one requires none.
        without_premise: why there is nothing to judge where the required claim is refuted.
        about: model and tasks that the claim was made for; it is not supported before all of them were run.
        note: how the bound was chosen, where the source leaves it open.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    order: int
    statement: str = Field(min_length=1)
    source: Literal["hypothesis", "expected_result", "expected_conclusion", "design"]
    quote: str = Field(min_length=1)
    measure: MeasureName
    contrast: dict[Role, Number]
    at_least: Number | None = None
    at_most: Number | None = None
    modules: ImportanceHalf | None = None
    budgets: Annotated[list[Annotated[float, Field(strict=False, gt=0)]], Field(min_length=1)] | None = None
    scope: Literal["each_cell", "pooled"]
    requires: str | None = None
    without_premise: str | None = None
    about: ClaimScope | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if self.at_least is None and self.at_most is None:
            raise ValueError("at_least or at_most is needed: without a bound nothing can be shown")
        if self.at_least is not None and self.at_most is not None and self.at_least >= self.at_most:
            raise ValueError(f"at_least ({self.at_least}) must be below at_most ({self.at_most})")
        if len(self.contrast) < 2 or 0 in self.contrast.values() or abs(sum(self.contrast.values())) > 1e-9:
            raise ValueError(
                f"contrast needs two roles or more whose weights are not 0 and sum to 0, got {self.contrast}"
            )
        if find_measure(self.measure).needs_modules != (self.modules is not None):
            names = " or ".join(measure.name for measure in known_measures().values() if measure.needs_modules)
            raise ValueError(f"modules goes with measure: {names}, one of {', '.join(get_args(ImportanceHalf))}")
        for bound in self.bounds:
            self.unit.check_bound(bound)
        return self

    def covers(self, cell: Cell) -> bool:
        """Return whether the cell has one of its budgets."""
        return self.budgets is None or cell.budget.percent in self.budgets

    @property
    def unit(self) -> Unit:
        """Unit of its bounds and of the values that are compared with them."""
        return find_measure(self.measure).unit

    @property
    def bounds(self) -> list[float]:
        """The lower and the upper bound, those that it has."""
        return [bound for bound in (self.at_least, self.at_most) if bound is not None]


def load_claims(folder: Path) -> dict[str, Claim]:
    """Read every claim of a folder.

    Args:
        folder: its files end in ``.yaml``.

    Returns:
        Claims by id, in their order.

    Raises:
        UserError: files that cannot be read, unknown keys, wrong values, a requirement that is no claim; all at once.
    """
    claims: dict[str, Claim] = {}
    problems: list[str] = []
    paths = sorted(folder.glob("*.yaml"))
    for path in paths:
        claim, found = load_model(path, Claim)
        problems += [f"{path.name}: {problem}" for problem in found]
        if claim is not None:
            claims[path.stem] = claim
    problems += [f"{path.name}: claims end in .yaml; rename it" for path in sorted(folder.glob("*.yml"))]
    names = {path.stem for path in paths}
    problems += [
        f"{name}.yaml: requires {claim.requires!r}, which is none of {', '.join(sorted(names - {name}))}"
        for name, claim in claims.items()
        if claim.requires is not None and claim.requires not in names - {name}
    ]
    problems += [
        f"{name}.yaml: requires {claim.requires!r}, which requires another claim itself; require that one"
        for name, claim in claims.items()
        if claim.requires in claims and claims[claim.requires].requires is not None
    ]
    if problems:
        raise UserError.collect(str(folder), problems)
    return dict(sorted(claims.items(), key=lambda item: (item[1].order, item[0])))
