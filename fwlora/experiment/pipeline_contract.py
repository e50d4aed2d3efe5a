"""What today's experiment pipelines (AIRAS) ask for beside the specified contract; nothing of it is anywhere else.

- Two modes more: ``sanity`` proves in seconds that a run works, ``pilot`` shows in a part of it whether the whole is
  worth its time. Both are recorded, in the projects ``<project>-sanity`` and ``<project>-pilot``.
- Such a run ends with a verdict and a summary on stdout, in the last two lines and nowhere else: pipelines search the
  whole of what was printed for ``SANITY_VALIDATION: PASS``. A run that does not pass ends with exit code 3.
- Pipelines list the run files in ``config/run``: :func:`mirror_run_files` makes that folder from ``config/runs``.

Source: github.com/airas-org/airas-template at 5c0545b, AGENTS.md and .github/workflows/run_experiment.yml.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fwlora.experiment.errors import UserError
from fwlora.experiment.files import write_files
from fwlora.experiment.json_types import JsonMapping, JsonObject
from fwlora.experiment.methods import get_method
from fwlora.experiment.settings.modes import Mode, limit_to_batches, register_mode
from fwlora.experiment.settings.schema import ProgramSettings
from fwlora.experiment.tracking import Tracker, metrics
from fwlora.experiment.tracking.records import RowKey

VALIDATION_FAILED = 3
MIRROR = "run"
# One batch again and again: between different batches a loss differs by more than it falls in a few steps.
SANITY_EPOCHS = 20
PILOT_SHARE = 0.25
PILOT_EPOCHS = 3
PILOT_TRIALS = 3
# Steps at each end, as a share of all, whose mean losses are compared: one step's loss is mostly its batch and dropout.
WINDOW = 0.2


@dataclass(frozen=True)
class Verdict:
    """Whether a run is what its mode asks for.

    Attributes:
        word: the mode in capitals, which starts both lines.
        reason: one word with underscores; empty of a run that passes.
        summary: what was judged.
    """

    word: str
    reason: str
    summary: JsonMapping

    def lines(self) -> list[str]:
        """Return the two lines, the verdict last."""
        outcome = f"FAIL reason={self.reason}" if self.reason else "PASS"
        return [
            f"{self.word}_VALIDATION_SUMMARY: {json.dumps(self.summary)}",
            f"{self.word}_VALIDATION: {outcome}",
        ]

    def announce(self) -> None:
        """Print the lines; end the process with exit code 3 where the run does not pass."""
        print("\n".join(self.lines()), flush=True)
        if self.reason:
            sys.exit(VALIDATION_FAILED)


@dataclass(frozen=True)
class Validation:
    """How a mode judges its runs by what they recorded.

    Attributes:
        mode: its name.
        least_steps: optimizer steps.
        allows_level: whether the training loss may end as high as it began; see ``WINDOW``.
        shows_primary: whether the summary names the primary metric, which then must not be zero; else it has the range
            of the accuracy, which must not be zero throughout.
    """

    mode: str
    least_steps: int
    allows_level: bool
    shows_primary: bool

    def judge(self, rows: Sequence[Mapping[str, float | int]], summary: JsonMapping) -> Verdict:
        """Judge a run.

        Args:
            rows: its history.
            summary: its final values.
        """
        losses = [row[metrics.TRAIN_LOSS] for row in rows if metrics.TRAIN_LOSS in row]
        accuracies = [row[metrics.eval_name("accuracy")] for row in rows if metrics.eval_name("accuracy") in row]
        primary = summary.get(metrics.PRIMARY_METRIC)
        value = summary.get(metrics.final_name(str(primary)))
        window = max(1, int(WINDOW * len(losses)))
        start, end = (sum(part) / window if losses else None for part in (losses[:window], losses[-window:]))
        shown: JsonObject = {"steps": len(losses), "loss_start": start, "loss_end": end}
        if self.shows_primary:
            shown |= {"primary_metric": primary, "primary_metric_value": value}
        else:
            shown |= {
                "accuracy_min": min(accuracies, default=None),
                "accuracy_max": max(accuracies, default=None),
            }
        numbers = [number for row in rows for number in row.values()]
        numbers += [number for number in summary.values() if isinstance(number, float)]
        checks = {
            "missing_metrics": not losses or not isinstance(value, int | float),
            "not_finite": not all(map(math.isfinite, numbers)),
            "too_few_steps": len(losses) < self.least_steps,
            "loss_did_not_fall": start is not None and end is not None and not self._falls(start, end),
            "primary_metric_is_zero": self.shows_primary and value == 0,
            "accuracy_is_zero": not self.shows_primary and bool(accuracies) and not any(accuracies),
        }
        return self._verdict(next((reason for reason, found in checks.items() if found), ""), shown)

    def judge_missing(self) -> Verdict:
        """Judge a run that ended before there was anything to judge."""
        return self._verdict("missing_metrics", {"steps": None, "loss_start": None, "loss_end": None})

    def _falls(self, start: float, end: float) -> bool:
        return end <= start if self.allows_level else end < start

    def _verdict(self, reason: str, summary: JsonObject) -> Verdict:
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in summary.items()}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in rounded.items()
        }
        return Verdict(self.mode.upper(), reason, finite)


VALIDATIONS = {
    "sanity": Validation("sanity", least_steps=5, allows_level=True, shows_primary=False),
    "pilot": Validation("pilot", least_steps=10, allows_level=False, shows_primary=True),
}


@dataclass
class WatchedTracker(Tracker):
    """Pass everything on to a tracker, and keep what a validation judges.

    Attributes:
        tracker: that records the run.
        validation: of the mode.
    """

    tracker: Tracker
    validation: Validation
    _rows: list[Mapping[str, float | int]] = field(default_factory=list)
    _summary: JsonObject = field(default_factory=dict)

    def log(self, values: Mapping[str, float | int]) -> None:
        """Add one history row."""
        self._rows.append(values)
        self.tracker.log(values)

    def update_config(self, values: JsonMapping) -> None:
        """Set config entries."""
        self.tracker.update_config(values)

    def set_summary(self, values: JsonMapping) -> None:
        """Set final values."""
        self._summary |= values
        self.tracker.set_summary(values)

    def finish(self, exit_code: int = 0) -> None:
        """End the record."""
        self.tracker.finish(exit_code)

    def recorded_rows(self, attempts: Sequence[int]) -> Collection[RowKey]:
        """Return the keys of the rows that earlier attempts have recorded."""
        return self.tracker.recorded_rows(attempts)

    def problem(self) -> str | None:
        """Return why the record is not whole."""
        return self.tracker.problem()

    def verdict(self) -> Verdict:
        """Judge the run."""
        return self.validation.judge(self._rows, self._summary)


def watch(tracker: Tracker, mode: str) -> Tracker:
    """Return the tracker of a run; in a mode that judges its runs one that also keeps what is judged."""
    return WatchedTracker(tracker, VALIDATIONS[mode]) if mode in VALIDATIONS else tracker


def announce_verdict(tracker: Tracker) -> None:
    """Print the verdict on a run that ended well, if its mode judges it; see :meth:`Verdict.announce`."""
    if isinstance(tracker, WatchedTracker):
        tracker.verdict().announce()


def is_verdict(line: str, mode: str) -> bool:
    """Return whether a line that a run printed belongs to its verdict."""
    return mode in VALIDATIONS and line.startswith(f"{mode.upper()}_VALIDATION")


def complete_verdict(lines: Sequence[str], mode: str) -> list[str]:
    """Return the lines of a run's verdict: those that it printed, or those of a run without metrics where it died.

    Args:
        lines: that it printed of its verdict.
        mode: of the run.
    """
    if mode not in VALIDATIONS or lines:
        return list(lines)
    return VALIDATIONS[mode].judge_missing().lines()


def _limit_to_sanity(settings: ProgramSettings) -> ProgramSettings:
    return limit_to_batches(settings, train_batches=1, eval_batches=1, epochs=SANITY_EPOCHS)


def _limit_to_pilot(settings: ProgramSettings) -> ProgramSettings:
    optuna = settings.run.optuna
    fewer = optuna.model_copy(update={"n_trials": min(optuna.n_trials, PILOT_TRIALS)})
    return settings.model_copy(update={"run": settings.run.model_copy(update={"optuna": fewer})})


def _shorten_to_pilot(settings: ProgramSettings, examples: int) -> ProgramSettings:
    """Take a quarter of the epochs, three at least, and the method's schedule at its share of them."""
    run = settings.run
    epochs = min(run.training.epochs, max(PILOT_EPOCHS, math.ceil(PILOT_SHARE * run.training.epochs)))
    if epochs == run.training.epochs:
        return settings
    training = run.training.model_copy(update={"epochs": epochs})
    try:
        run = get_method(run.method).rescale(run, run.training.total_steps(examples), training.total_steps(examples))
    except ValueError as error:
        raise UserError(f"mode=pilot of {epochs} epochs: {error}") from None
    return settings.model_copy(update={"run": run.model_copy(update={"training": training})})


register_mode(
    Mode(
        "sanity",
        f"one batch, {SANITY_EPOCHS} times; recorded in <project>-sanity, ends with a verdict",
        _limit_to_sanity,
        project_suffix="-sanity",
    )
)
register_mode(
    Mode(
        "pilot",
        f"a quarter of the epochs, {PILOT_EPOCHS} at least; recorded in <project>-pilot, ends with a verdict",
        _limit_to_pilot,
        fit=_shorten_to_pilot,
        project_suffix="-pilot",
    )
)


def mirror_run_files(config_dir: Path) -> list[Path]:
    """Make ``config/run`` of ``config/runs``: the same files with the same bytes, and no others.

    Args:
        config_dir: the folder that holds both.

    Returns:
        The files that were written or removed.

    Raises:
        UserError: a file that cannot be read or written.
    """
    wanted = {
        config_dir / MIRROR / path.name: path.read_bytes() for path in sorted((config_dir / "runs").glob("*.yaml"))
    }
    present = {path: path.read_bytes() for path in (config_dir / MIRROR).glob("*.yaml")}
    changed = {path: content for path, content in wanted.items() if present.get(path) != content}
    stray = sorted(set(present) - set(wanted))
    try:
        write_files(changed)
        for path in stray:
            path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None
    return [*changed, *stray]


def describe_edited_copy(config_dir: Path, file_id: str) -> str | None:
    """Say that the copy of a run file differs from the file, which is the one that counts; None where it does not."""
    copy, original = (config_dir / folder / f"{file_id}.yaml" for folder in (MIRROR, "runs"))
    if not copy.is_file() or not original.is_file() or copy.read_bytes() == original.read_bytes():
        return None
    return (
        f"config/{MIRROR}/{file_id}.yaml differs from config/runs/{file_id}.yaml, which is the one that is used; edit "
        "that one, then run: fwlora mirror-runs"
    )
