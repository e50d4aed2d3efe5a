"""What defines a run, so that a continued one is the same: settings, data, weights, and how they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwlora.experiment.files import digest_file
from fwlora.experiment.json_types import JsonMapping, JsonObject, JsonValue

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import ProgramSettings
    from fwlora.experiment.tracking.facts import RunFacts

# A run that is continued in another environment goes on, but not to the byte.
ENVIRONMENT = "environment"
_PACKAGES = ("torch", "transformers", "peft", "optuna", "fwlora")
_MOST_SHOWN, _SHOWN_DIGITS = 20, 16


def describe_identity(
    settings: ProgramSettings,
    facts: RunFacts,
    weight_files: Sequence[Path],
    *,
    processes: int,
    threads: int,
    device: str,
) -> JsonObject:
    """Describe a run by everything that its bytes depend on.

    Args:
        settings: of the run and the program.
        facts: what the program found out.
        weight_files: of the pretrained model, which are read.
        processes: that take part.
        threads: of each.
        device: the type, ``cpu`` or ``cuda``.

    Raises:
        OSError: a file cannot be read.
    """
    tracker = settings.tracker_settings
    environment = facts.environment
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    return {
        "run": settings.run.model_dump(mode="json"),
        "mode": settings.mode,
        settings.tracker: {name: getattr(tracker, name) for name in tracker.source_fields},
        "engine": {
            "fast": settings.engine.fast, "batches": settings.engine.batches,
            "cuda_graphs": settings.engine.cuda_graphs,
            "precision": facts.precision, "kernels": facts.kernels, "processes": processes, "device": device,
        },
        "data": {
            "train": facts.train_fingerprint, "eval": facts.eval_fingerprint,
            "train_examples": facts.train_examples, "eval_examples": facts.eval_examples,
            "labels": list(facts.label_names),
        },
        "weights": {path.name: digest_file(path)[:_SHOWN_DIGITS] for path in weight_files},
        ENVIRONMENT: {
            "threads": threads, "device": environment.get("device"), "cpu": environment.get("cpu"),
            **{name: versions.get(name) for name in _PACKAGES if name in versions},
        },
    }  # fmt: skip


def find_differences(recorded: JsonMapping, present: JsonMapping) -> tuple[list[str], list[str]]:
    """Compare two identities.

    Args:
        recorded: of an earlier attempt. Weights that it could not name, as they had to be fetched first, and whole
            sections that it does not have are not compared.
        present: of this one.

    Returns:
        A line for every difference in what defines the run, and for every one in its environment.
    """
    defining: list[str] = []
    surrounding: list[str] = []
    shared = [name for name in present if recorded.get(name) not in (None, {})]
    before, now = (dict(_flatten({name: node[name] for name in shared})) for node in (recorded, present))
    for key in [*before, *(key for key in now if key not in before)]:
        if key not in now or key not in before or now[key] != before[key]:
            then, present_now = (_show(values[key]) if key in values else "not there" for values in (before, now))
            line = f"{key}: {then} then, {present_now} now"
            (surrounding if key.startswith(f"{ENVIRONMENT}.") else defining).append(line)
    if len(defining) > _MOST_SHOWN:
        defining = [*defining[:_MOST_SHOWN], f"and {len(defining) - _MOST_SHOWN} more"]
    return defining, surrounding


def _flatten(value: JsonMapping, path: str = "") -> Iterator[tuple[str, JsonValue]]:
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flatten(item, f"{path}{name}.")
        else:
            yield f"{path}{name}", item


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
