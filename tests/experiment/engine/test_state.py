"""A training that is stopped and continued is the training that never stopped, to the last bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.task import Task
from fwlora.experiment.engine.watch import TrainingWatch
from fwlora.experiment.resume.encoding import load_state, save_state
from tests.gate.training_cases import attach_method, make_options, make_split
from tests.helpers.engine_options import CPU, pad_literally

TASK = Task(pad_token_id=1, num_classes=2, task_metric="accuracy")
# 15 steps per epoch, 8 of them Fisher warm-up.
IN_WARMUP, AFTER_WARMUP, END_OF_EPOCH, SECOND_EPOCH = 5, 11, 15, 22
CASES = {
    "head": ("head", {}, CPU),
    "lora": ("lora", {}, CPU),
    "lora, the model's own forward": ("lora", {}, pad_literally(16)),
    "adalora": ("adalora", {}, CPU),
    "fw_lora": ("fw_lora", {}, CPU),
    "fw_lora, exact": ("fw_lora", {"estimator": "exact"}, CPU),
    "fw_lora, reallocate": ("fw_lora", {"allocation": "reallocate"}, CPU),
    "fw_lora, the model's own forward": ("fw_lora", {"fisher_every": 1}, pad_literally(16)),
}


class Stopped(Exception):
    pass


class StopAt(TrainingWatch):
    """Keeps the state where a place is reached, through files as a checkpoint does, and ends the training there.

    Args:
        place: ("step", n), ("epoch", n) or ("evaluation", n of the evaluation's batches).
        folder: for the files.
    """

    def __init__(self, place, folder):
        self.place, self.folder, self.batches = place, folder, itertools.count(1)
        self.state = None

    def _reach(self, place, state):
        if place == self.place:
            save_state(state.state_dict(), self.folder / "state")
            self.state = load_state(self.folder / "state")
            raise Stopped

    def after_step(self, state):
        self._reach(("step", state.position.step), state)

    def after_epoch(self, state):
        self._reach(("epoch", state.position.epoch), state)

    def during_evaluation(self, state):
        self._reach(("evaluation", next(self.batches)), state)


def run(case, *, stop=None, resume_from=None):
    """Train; return rows, last evaluation and weights, or the state where it was stopped."""
    method_name, options, engine = CASES[case]
    model, method = attach_method(method_name, options)
    rows = []
    try:
        result = train(
            model, method, make_split(60, 0), make_split(24, 1), make_options(), TASK, engine,
            log=lambda row: rows.append(dict(row)), watch=stop, resume_from=resume_from,
        )  # fmt: skip
    except Stopped:
        return rows, stop.state
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return rows, result, weights, method.adapter_table()


@pytest.fixture(scope="module")
def uninterrupted():
    found = {}
    return lambda case: found.setdefault(case, run(case))


PLACES = [("step", step) for step in (IN_WARMUP, AFTER_WARMUP, END_OF_EPOCH, SECOND_EPOCH, 30)]
PLACES += [("epoch", 1), ("epoch", 2), ("evaluation", 1), ("evaluation", 2), ("evaluation", 6)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_a_continued_training_is_the_uninterrupted_one(case, place, uninterrupted, tmp_path):
    rows, result, weights, table = uninterrupted(case)
    first_rows, state = run(case, stop=StopAt(place, tmp_path))
    torch.rand(7)
    more_rows, continued, final_weights, final_table = run(case, resume_from=state)
    steps = [row["global_step"] for row in first_rows if "train_loss" in row]
    # An evaluation has three batches.
    reached = {"step": place[1], "epoch": 15 * place[1], "evaluation": 15 * -(-place[1] // 3)}[place[0]]
    assert steps == list(range(1, reached + 1))
    assert first_rows + more_rows == rows
    assert continued.last.values == result.last.values and continued.epochs == result.epochs
    assert continued.last.predictions.tolist() == result.last.predictions.tolist()
    assert continued.total_steps == result.total_steps and len(continued.step_times_s) == len(result.step_times_s)
    assert final_table == table
    torch.testing.assert_close(final_weights, weights, rtol=0, atol=0)


def test_every_part_of_the_state_counts(tmp_path):
    """Each part alone, left as a new training has it, changes what follows."""
    _, state = run("fw_lora", stop=StopAt(("step", AFTER_WARMUP), tmp_path))
    rows, *_ = run("fw_lora", resume_from=state)
    _, fresh = run("fw_lora", stop=StopAt(("step", 1), tmp_path))
    for part in ("position", "weights", "optimizer", "scheduler", "meter", "random"):
        other, *_ = run("fw_lora", resume_from={**state, part: fresh[part]})
        assert other != rows, part


def test_the_state_of_another_step_or_another_seed_gives_another_training(tmp_path):
    rows, _, weights, _ = run("lora")
    _, state = run("lora", stop=StopAt(("step", 5), tmp_path))
    _, later = run("lora", stop=StopAt(("step", 6), tmp_path))
    for changed in ({**state, "weights": later["weights"]}, {**state, "random": later["random"]}):
        more_rows, _, other, _ = run("lora", resume_from=changed)
        assert rows[5:] != more_rows
        assert any(not torch.equal(value, weights[name]) for name, value in other.items())


def test_the_state_of_another_method_is_refused(tmp_path):
    _, state = run("lora", stop=StopAt(("step", 3), tmp_path))
    with pytest.raises(ValueError, match="`state` is not a state of FisherWeightedLora"):
        run("fw_lora", resume_from=state)
