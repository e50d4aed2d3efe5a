"""Choose the runs of a cell on which a claim is judged, and check that they are comparable."""

from __future__ import annotations

from collections.abc import Sequence

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.measures import find_measure
from fwlora.experiment.evaluation.compare.bootstrap import ResampledRuns
from fwlora.experiment.evaluation.compare.cells import Cell, Group
from fwlora.experiment.evaluation.compare.comparability import (
    DECIDING_FACTS,
    find_disagreement,
    find_unequal_facts,
    find_unequal_settings,
)
from fwlora.experiment.evaluation.compare.contrasts import (
    Contrast,
    MissingMeasurementError,
    Sample,
)
from fwlora.experiment.evaluation.compare.settings import format_setting
from fwlora.experiment.evaluation.compare.variants import label_role
from fwlora.experiment.methods import find_method


def sample_claim(claim: Claim, cell: Cell, resampled: ResampledRuns) -> Sample:
    """Compute the claim's contrast in one cell.

    Args:
        claim: to be judged.
        cell: one of those that it covers.
        resampled: scores of all runs.

    Raises:
        MissingMeasurementError: a method was not run, or the runs differ in more than the method.
    """
    contrast: Contrast = [(weight, _choose_group(cell, role)) for role, weight in claim.contrast.items()]
    groups = [group for _, group in contrast]
    runs = [run for group in groups for run in group.runs]
    unequal = find_unequal_settings(groups) + find_unequal_facts(runs, DECIDING_FACTS)
    if unequal:
        raise MissingMeasurementError(f"its runs differ in more than the method ({'; '.join(unequal)})")
    for run in runs:
        if disagreement := find_disagreement(run):
            raise MissingMeasurementError(disagreement)
    _require_equal_strength(groups)
    return find_measure(claim.measure).sample(cell, contrast, resampled, claim.modules)


def _choose_group(cell: Cell, role: str) -> Group:
    groups = [group for group in cell.groups if group.role == role]
    name = label_role(role)
    if not groups:
        raise MissingMeasurementError(f"no runs of {name}")
    spec = find_method(groups[0].runs[0].method)
    if groups[0].is_proposed and spec is not None:
        claimed = spec.claimed_settings
        matching = [g for g in groups if all(g.settings.get(key, value) == value for key, value in claimed.items())]
        if not matching:
            variants = ", ".join(f"{key} = {format_setting(groups[0].settings.get(key))}" for key in claimed)
            raise MissingMeasurementError(
                f"{name} was run only as another variant than the specification's ({variants})"
            )
        groups = matching
    if len(groups) > 1:
        raise MissingMeasurementError(f"several variants of {name}; evaluate one of them at a time")
    return groups[0]


def _require_equal_strength(groups: Sequence[Group]) -> None:
    """Raise unless the control has the proposed method's strength for every seed; a search may have set both."""
    proposed = [group for group in groups if group.is_proposed]
    controls = [group for group in groups if group.is_control]
    if not proposed or not controls:
        return
    spec = find_method(proposed[0].runs[0].method)
    keys = () if spec is None else (*spec.strength_settings, *spec.control_settings)
    ours, theirs = proposed[0].by_seed(), controls[0].by_seed()
    for seed in sorted(ours.keys() & theirs.keys()):
        for key in keys:
            value, control_value = (run.recorded.get(key) for run in (ours[seed], theirs[seed]))
            if value != control_value:
                shown = f"{control_value} for {theirs[seed].run_id}, {value} for {ours[seed].run_id}"
                raise MissingMeasurementError(f"the control's {key} is not the method's ({shown})")
