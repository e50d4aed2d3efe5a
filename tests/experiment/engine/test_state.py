"""A training that is stopped and continued is the training that never stopped, to the last bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from fwlora.experiment.engine.loop import train
from fwlora.experiment.engine.task import Task
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


def run(case, *, stop_after=None, resume_from=None):
    """Train; return rows, last evaluation and weights, or the file of the state where it was stopped."""
    method_name, options, engine = CASES[case]
    model, method = attach_method(method_name, options)
    rows, saved = [], io.BytesIO()

    def on_step(state):
        if state.position.step == stop_after:
            torch.save(state.state_dict(), saved)
            raise Stopped

    try:
        result = train(
            model, method, make_split(60, 0), make_split(24, 1), make_options(), TASK, engine,
            log=lambda row: rows.append(dict(row)), on_step=on_step, resume_from=resume_from,
        )  # fmt: skip
    except Stopped:
        saved.seek(0)
        return rows, saved
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return rows, result, weights, method.adapter_table()


@pytest.fixture(scope="module")
def uninterrupted():
    found = {}
    return lambda case: found.setdefault(case, run(case))


@pytest.mark.parametrize("step", [IN_WARMUP, AFTER_WARMUP, END_OF_EPOCH, SECOND_EPOCH])
@pytest.mark.parametrize("case", CASES)
def test_a_continued_training_is_the_uninterrupted_one(case, step, uninterrupted):
    rows, result, weights, table = uninterrupted(case)
    first_rows, saved = run(case, stop_after=step)
    torch.rand(7)
    more_rows, continued, final_weights, final_table = run(case, resume_from=torch.load(saved))
    assert [row["global_step"] for row in first_rows if "train_loss" in row] == list(range(1, step + 1))
    assert first_rows + more_rows == rows
    assert continued.last.values == result.last.values and continued.epochs == result.epochs
    assert continued.last.predictions.tolist() == result.last.predictions.tolist()
    assert continued.total_steps == result.total_steps and len(continued.step_times_s) == len(result.step_times_s)
    assert final_table == table
    torch.testing.assert_close(final_weights, weights, rtol=0, atol=0)


def test_every_part_of_the_state_counts():
    """Each part alone, left as a new training has it, changes what follows."""
    _, saved = run("fw_lora", stop_after=AFTER_WARMUP)
    rows, *_ = run("fw_lora", resume_from=torch.load(saved))
    _, fresh = run("fw_lora", stop_after=1)
    for part in ("position", "weights", "optimizer", "scheduler", "meter", "random"):
        saved.seek(0)
        fresh.seek(0)
        mixed = {**torch.load(saved), part: torch.load(fresh)[part]}
        other, *_ = run("fw_lora", resume_from=mixed)
        assert other != rows, part


def test_the_state_of_a_finished_training_or_of_another_method_is_refused():
    states = []
    method_name, options, engine = CASES["lora"]
    model, method = attach_method(method_name, options)
    train(
        model, method, make_split(60, 0), make_split(24, 1), make_options(), TASK, engine, log=lambda row: None,
        on_step=states.append,
    )  # fmt: skip
    finished = copy.deepcopy(states[-1].state_dict())
    with pytest.raises(ValueError, match="`resume_from` is the state of a finished training"):
        run("lora", resume_from=finished)
    with pytest.raises(ValueError, match="`state` is not a state of FisherWeightedLora"):
        run("fw_lora", resume_from=finished)
