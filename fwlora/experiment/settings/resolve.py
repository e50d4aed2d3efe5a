"""From a composed configuration to the settings of a run: what follows from them, and every mistake in one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from pydantic import ValidationError

from fwlora.experiment.errors import UserError, describe_validation_error
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods import get_method, method_nodes
from fwlora.experiment.paths import expand_home
from fwlora.experiment.settings.modes import get_mode
from fwlora.experiment.settings.schema import ProgramSettings, RunSettings, program_settings_class
from fwlora.experiment.tracking import DEFAULT_TRACKER, known_trackers


def resolve_settings(composed: JsonMapping, *, file_id: str, file_seed: int | None) -> ProgramSettings:
    """Validate the composed configuration and apply what follows from it.

    A seed other than the file's is added to the run id, so that two seeds never share a folder or a W&B run; nodes of
    other methods are dropped; the mode's limits hold.

    Args:
        composed: the configuration as plain containers.
        file_id: which run file was selected.
        file_seed: the seed that the file itself states.

    Raises:
        UserError: every unknown key, wrong type and refused value, each with its key path.
    """
    composed = {key: value for key, value in composed.items() if key != "hydra"}
    run = composed.get("run")
    if not isinstance(run, Mapping):
        raise UserError(f"config/runs/{file_id}.yaml: holds {run!r}, not a mapping of settings")
    run, problems = _drop_foreign_nodes(run)
    if isinstance(run.get("optuna"), Mapping):
        run["optuna"] = _normalize_search_space(run["optuna"])
    training = run.get("training")
    seed = training.get("seed") if isinstance(training, Mapping) else None
    run_id = run.get("run_id")
    if isinstance(run_id, str) and seed is not None and seed != file_seed and not run_id.endswith(f"-s{seed}"):
        run["run_id"] = f"{run_id}-s{seed}"
    # Pipelines may pass `results_dir=` with nothing behind it; that means the default.
    results_dir = composed.get("results_dir") or ProgramSettings.model_fields["results_dir"].default
    composed["results_dir"] = str(expand_home(results_dir)) if _has_home(results_dir) else results_dir
    tracker = composed["tracker"] = str(composed.get("tracker") or DEFAULT_TRACKER)
    composed = _keep_tracker_node(composed, tracker)
    settings, settings_class = None, program_settings_class(tracker)
    try:
        settings = settings_class.model_validate({**composed, "run": run})
    except ValidationError as error:
        problems += describe_validation_error(error, settings_class)
    if settings is None or problems:
        raise UserError.collect(f"config/runs/{file_id}.yaml and its overrides", problems)
    return get_mode(settings.mode).limit(settings)


def _has_home(folder: object) -> TypeGuard[str]:
    return isinstance(folder, str) and folder.startswith("~")


def check_schedules(run: RunSettings, total_steps: int) -> None:
    """Check that the method's schedule fits the run; log a warning where it barely does.

    Raises:
        UserError: it does not fit ``total_steps`` optimizer steps.
    """
    get_method(run.method).check(run, total_steps)


def _drop_foreign_nodes(run: JsonMapping) -> tuple[JsonObject, list[str]]:
    """Drop the nodes of other methods, which hold their defaults.

    Returns:
        The remaining run node, and a line for each value of another method that differs from its default.
    """
    foreign = {node: spec for node, spec in method_nodes().items() if spec.name != run.get("method")}
    problems = []
    for node, spec in foreign.items():
        given = run.get(node)
        given = given if isinstance(given, Mapping) else {"(not a section)": given} if given else {}
        known = {} if spec.Settings is None else spec.Settings.model_fields
        changed = sorted(key for key, value in given.items() if key not in known or known[key].default != value)
        problems += [
            f"run.{node}.{key} = {given[key]!r} is read by {spec.name} only, not by {run.get('method')}"
            for key in changed
        ]
    return {key: value for key, value in run.items() if key not in foreign}, problems


def _keep_tracker_node(composed: JsonMapping, tracker: str) -> JsonObject:
    """Drop the nodes of other trackers; add an empty one where the tracker has none, for its defaults."""
    kept = {key: value for key, value in composed.items() if key == tracker or key not in known_trackers()}
    return {tracker: {}, **kept} if tracker in known_trackers() else kept


def _normalize_search_space(optuna: JsonMapping) -> JsonObject:
    space = optuna.get("search_space") or {}
    if not isinstance(space, Mapping):
        return dict(optuna)
    # First-generation pipelines write the key `type` as `distribution_type` in some files.
    renamed = {
        name: {("type" if key == "distribution_type" else key): value for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for name, entry in space.items()
    }
    return {**optuna, "search_space": renamed}
