"""The seam for modes: named changes of a run's settings, applied once they are validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fwlora.experiment.methods import get_method

if TYPE_CHECKING:
    from fwlora.experiment.settings.schema import ProgramSettings

TRIAL_BATCHES = 2


@dataclass(frozen=True)
class Mode:
    """A value of ``mode``.

    Attributes:
        name: the value.
        summary: what it is, for the help text.
        limit: takes validated settings and returns those of the mode.
        is_recorded: whether the tracker records the run; else it is checked, and nothing is left of it but its log.
        keeps_model: whether the trained model is saved.
        fit: changes the settings further once it is known how many training examples there are.
        project_suffix: of the tracker's project, so that runs of the mode are not among those that are compared.
    """

    name: str
    summary: str
    limit: Callable[[ProgramSettings], ProgramSettings]
    is_recorded: bool = True
    keeps_model: bool = False
    fit: Callable[[ProgramSettings, int], ProgramSettings] = lambda settings, examples: settings
    project_suffix: str = ""


PIPELINE_MODES = "fwlora.experiment.pipeline_contract"
_MODES: dict[str, Mode] = {}


def register_mode(mode: Mode) -> None:
    """Add a mode.

    Raises:
        ValueError: another mode has the name.
    """
    if _MODES.get(mode.name, mode) != mode:
        raise ValueError(f"`name` {mode.name!r} is taken by another mode; choose another")
    _MODES[mode.name] = mode


def known_modes() -> dict[str, Mode]:
    """Return every registered mode by name."""
    import_module(PIPELINE_MODES)
    return dict(_MODES)


def get_mode(name: str) -> Mode:
    """Return the mode that validated settings name."""
    return known_modes()[name]


def limit_to_batches(
    settings: ProgramSettings, *, train_batches: int, eval_batches: int, epochs: int
) -> ProgramSettings:
    """Limit a run to a few batches without a search; every path of a full run is still taken.

    Args:
        settings: of a full run.
        train_batches: of the training split.
        eval_batches: of the evaluation split.
        epochs: over these batches.
    """
    run = get_method(settings.run.method).limit_to_trial(settings.run)
    size = run.training.batch_size
    limits = {
        "training": run.training.model_copy(update={"epochs": epochs, "gradient_accumulation_steps": 1}),
        "dataset": run.dataset.model_copy(
            update={"train_examples": train_batches * size, "eval_examples": eval_batches * size}
        ),
        "optuna": run.optuna.model_copy(update={"n_trials": 0}),
    }
    return settings.model_copy(update={"run": run.model_copy(update=limits)})


def _limit_to_trial(settings: ProgramSettings) -> ProgramSettings:
    settings = limit_to_batches(settings, train_batches=TRIAL_BATCHES, eval_batches=TRIAL_BATCHES, epochs=1)
    return settings.model_copy(update={settings.tracker: settings.tracker_settings.limit_to_trial()})


def _fit_trial(settings: ProgramSettings, examples: int) -> ProgramSettings:
    """Make the batches of a trial smaller if the data fill only one: a method's phases need a step each."""
    training = settings.run.training
    if training.total_steps(examples) >= TRIAL_BATCHES or examples < TRIAL_BATCHES:
        return settings
    smaller = training.model_copy(update={"batch_size": examples // TRIAL_BATCHES + examples % TRIAL_BATCHES})
    return settings.model_copy(update={"run": settings.run.model_copy(update={"training": smaller})})


register_mode(
    Mode(
        "trial",
        "one epoch of two batches, no record, no search",
        _limit_to_trial,
        fit=_fit_trial,
        is_recorded=False,
    )
)
register_mode(Mode("full", "everything", lambda settings: settings, keeps_model=True))
