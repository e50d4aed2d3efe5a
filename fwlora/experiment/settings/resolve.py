"""From a composed configuration to the settings of a run: what follows from them, and every mistake in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fwlora.experiment.errors import UserError
from fwlora.experiment.settings.schema import METHOD_NODES, ProgramSettings, RunSettings

TRIAL_BATCHES = 2


def resolve_settings(
    composed: Mapping[str, Any], *, file_id: str, file_seed: int | None, defaults: Mapping[str, Any]
) -> ProgramSettings:
    """Validates the composed configuration and applies what follows from it.

    A seed other than the file's is added to the run id, so that two seeds never share a folder or a W&B run; nodes of
    other methods are dropped; trial mode is limited.

    Args:
        composed: the configuration as plain containers.
        file_id: which run file was selected.
        file_seed: the seed that the file itself states.
        defaults: the content of ``config.yaml``.

    Raises:
        UserError: every unknown key, wrong type and refused value, each with its key path.
    """
    composed = {key: value for key, value in composed.items() if key != "hydra"}
    run = composed.get("run")
    if not isinstance(run, Mapping):
        raise UserError(f"config/runs/{file_id}.yaml: holds {run!r}, not a mapping of settings")
    run = dict(run)
    problems = _drop_foreign_nodes(run, defaults["run"])
    if isinstance(run.get("optuna"), Mapping):
        run["optuna"] = _normalise_search_space(run["optuna"])
    training = run.get("training")
    seed = training.get("seed") if isinstance(training, Mapping) else None
    run_id = run.get("run_id")
    if isinstance(run_id, str) and seed is not None and seed != file_seed and not run_id.endswith(f"-s{seed}"):
        run["run_id"] = f"{run_id}-s{seed}"
    # Pipelines may pass `results_dir=` with nothing behind it; that means the default.
    composed["results_dir"] = composed.get("results_dir") or defaults["results_dir"]
    try:
        settings = ProgramSettings.model_validate({**composed, "run": run})
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
        raise UserError.collect(f"config/runs/{file_id}.yaml and its overrides", problems) from None
    if problems:
        raise UserError.collect(f"config/runs/{file_id}.yaml and its overrides", problems)
    return limit_to_trial(settings) if settings.mode == "trial" else settings


def limit_to_trial(settings: ProgramSettings) -> ProgramSettings:
    """Trial mode: one epoch of two batches, W&B disabled, no search; every path of a full run is still taken."""
    run = settings.run
    batch_size = run.training.batch_size
    limits: dict[str, Any] = {
        "training": run.training.model_copy(update={"epochs": 1, "gradient_accumulation_steps": 1}),
        "dataset": run.dataset.model_copy(
            update={"train_examples": TRIAL_BATCHES * batch_size, "eval_examples": TRIAL_BATCHES * batch_size}
        ),
        "optuna": run.optuna.model_copy(update={"n_trials": 0}),
    }
    if run.fw_lora:
        limits["fw_lora"] = run.fw_lora.model_copy(update={"warmup_steps": 1})
    if run.adalora:
        limits["adalora"] = run.adalora.model_copy(update={"tinit": 0, "tfinal": 0, "deltaT": 1})
    return settings.model_copy(
        update={
            "run": run.model_copy(update=limits),
            "wandb": settings.wandb.model_copy(update={"mode": "disabled", "required": False}),
        }
    )


def fit_trial_to_data(settings: ProgramSettings, examples: int) -> ProgramSettings:
    """A trial of data that make a single batch takes smaller ones: warm-up and shrinkage need a step each."""
    training = settings.run.training
    if training.total_steps(examples) >= TRIAL_BATCHES or examples < TRIAL_BATCHES:
        return settings
    smaller = training.model_copy(update={"batch_size": examples // TRIAL_BATCHES + examples % TRIAL_BATCHES})
    return settings.model_copy(update={"run": settings.run.model_copy(update={"training": smaller})})


def check_schedules(run: RunSettings, total_steps: int) -> str | None:
    """Whether the method's schedule fits the run; a warning where it barely does.

    Raises:
        UserError: a Fisher warm-up that never ends, or an AdaLoRA schedule without steps to allocate in.
    """
    if run.adalora is not None:
        tinit, tfinal = run.adalora.tinit, run.adalora.tfinal
        if tinit >= total_steps - tfinal or total_steps - tfinal < 2:
            raise UserError(
                f"run.adalora: tinit = {tinit} and tfinal = {tfinal} of {total_steps} optimiser steps leave AdaLoRA "
                "no steps to allocate ranks in; lower them, or lower run.training.batch_size"
            )
    return check_fisher_warmup(run.fw_lora.warmup_steps, total_steps) if run.fw_lora else None


def check_fisher_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """A warning where the Fisher warm-up takes more than half of the run.

    Raises:
        UserError: the warm-up never ends, so that FW-LoRA would silently be LoRA.
    """
    if warmup_steps >= total_steps:
        raise UserError(
            f"run.fw_lora.warmup_steps is {warmup_steps}, but the run has {total_steps} optimiser steps: importances "
            f"would never be used and FW-LoRA would be LoRA; set run.fw_lora.warmup_steps below {total_steps}, or "
            "lower run.training.batch_size"
        )
    if 2 * warmup_steps > total_steps:
        return (
            f"warning: the Fisher warm-up takes {warmup_steps} of {total_steps} optimiser steps; "
            "shrinkage acts in less than half of the run"
        )
    return None


def _drop_foreign_nodes(run: dict[str, Any], run_defaults: Mapping[str, Any]) -> list[str]:
    problems = []
    for node, method in METHOD_NODES.items():
        if run.get("method") == method or node not in run:
            continue
        given = run.pop(node)
        given = given if isinstance(given, Mapping) else {"(not a section)": given} if given else {}
        default = run_defaults.get(node) or {}
        changed = sorted(key for key, value in given.items() if key not in default or default[key] != value)
        problems += [
            f"run.{node}.{key} = {given[key]!r} is read by {method} only, not by {run.get('method')}" for key in changed
        ]
    return problems


def _normalise_search_space(optuna: Mapping[str, Any]) -> dict[str, Any]:
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


def _describe(item: Any) -> str:
    """One line for one pydantic error: key path, value, what is accepted."""
    tags = {"loguniform", "uniform", "int", "categorical"}
    parts = [str(part) for part in item["loc"]]
    if "search_space" in parts:
        after = parts.index("search_space") + 2
        parts = parts[:after] + [part for part in parts[after:] if part not in tags]
    path = ".".join(parts) or "settings"
    if item["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}" if known else ""
        return f"{path}: unknown key" + (f"; {hint}" if hint else "")
    if item["type"] == "missing":
        return f"{path}: missing"
    if item["type"] == "union_tag_invalid":
        return f"{path}.type = {item['ctx']['tag']!r}: choose one of {', '.join(sorted(tags))}"
    if item["type"] == "union_tag_not_found":
        return f"{path}.type: missing; choose one of {', '.join(sorted(tags))}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(parents: list[str]) -> list[str]:
    model: Any = ProgramSettings
    for part in parents:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
