"""Which runs of a cell answer a claim, and whether they may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import ROLE_NAMES, Cell, Group, Role
from fwlora.experiment.evaluation.compare.comparability import (
    DECIDING_FACTS,
    find_disagreement,
    find_unequal_facts,
    find_unequal_settings,
)
from fwlora.experiment.evaluation.compare.contrasts import (
    Sample,
    Terms,
    Unmeasured,
    sample_cost,
    sample_quality,
    sample_update_norm,
)
from fwlora.experiment.evaluation.compare.runs import EvaluatedRun

_STRENGTH_SETTINGS = ("lambda_fw", "warmup_steps", "allocation")
# The specification's own variant, which its claims speak of.
_SPECIFIED = {"fw_lora.importance": '"sum"', "fw_lora.allocation": '"shrink"'}


def sample_claim(claim: Claim, cell: Cell, resampled: ResampledRuns) -> Sample:
    """The claim's contrast in one cell.

    Raises:
        Unmeasured: a method was not run, or the runs differ in more than the method.
    """
    terms: Terms = [(weight, _choose_group(cell, role)) for role, weight in claim.contrast.items()]
    groups = [group for _, group in terms]
    runs = [run for group in groups for run in group.runs]
    unequal = find_unequal_settings(groups) + find_unequal_facts(runs, DECIDING_FACTS)
    if unequal:
        raise Unmeasured(f"its runs differ in more than the method ({'; '.join(unequal)})")
    for run in runs:
        if disagreement := find_disagreement(run):
            raise Unmeasured(disagreement)
    _require_equal_strength(groups)
    if claim.measure == "quality":
        return sample_quality(cell, terms, resampled)
    if claim.measure == "training_time":
        return sample_cost(cell, terms)
    assert claim.modules is not None, "checked when the claim was read"
    return sample_update_norm(cell, terms, claim.modules)


def _choose_group(cell: Cell, role: Role) -> Group:
    groups = [group for group in cell.groups if group.role == role]
    name = ROLE_NAMES.get(role, role)
    if not groups:
        raise Unmeasured(f"no runs of {name}")
    if role == "proposed":
        own = [g for g in groups if all(g.settings.get(key, value) == value for key, value in _SPECIFIED.items())]
        if not own:
            variants = ", ".join(f"{key} = {groups[0].settings.get(key)}" for key in _SPECIFIED)
            raise Unmeasured(f"{name} was run only as another variant than the specification's ({variants})")
        groups = own
    if len(groups) > 1:
        raise Unmeasured(f"several variants of {name}; evaluate one of them at a time")
    return groups[0]


def _require_equal_strength(groups: Sequence[Group]) -> None:
    """The control is one only at the method's own strength, which a search may have set, for each seed."""
    proposed, control = ([g for g in groups if g.role == role] for role in ("proposed", "control"))
    if not proposed or not control:
        return
    ours, theirs = proposed[0].by_seed(), control[0].by_seed()
    for seed in sorted(ours.keys() & theirs.keys()):
        for key in _STRENGTH_SETTINGS:
            values = [_read_strength(run, key) for run in (ours[seed], theirs[seed])]
            if values[0] != values[1]:
                told = f"{values[1]} for {theirs[seed].run_id}, {values[0]} for {ours[seed].run_id}"
                raise Unmeasured(f"the control's fw_lora.{key} is not the method's ({told})")


def _read_strength(run: EvaluatedRun, key: str) -> Any:
    return (run.record.config["run"].get("fw_lora") or {}).get(key)
