"""Which groups of a cell a claim is judged on, and what forbids it."""

from __future__ import annotations

import pytest

from fwlora.experiment.evaluation.claims.samples import sample_claim
from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.contrasts import MissingMeasurementError, Sample
from fwlora.experiment.evaluation.compare.runs import read_runs
from tests.helpers.evaluation_records import change
from tests.helpers.verdict_runs import make_claim, make_run


def sample(records, **claim) -> Sample:
    runs = read_runs(records)
    (cell,) = group_cells(runs)
    return sample_claim(make_claim(**claim), cell, resample_runs(runs, 0, 20))


def rename(record, run_id: str, **paths):
    return change(record, run_id=run_id, config__run__run_id=run_id, **paths)


PAIR = [
    make_run("lora", 1, 3000),
    make_run("lora", 2, 3000),
    make_run("proposed", 1, 3040, summary__training_time_s=101.0),
    make_run("proposed", 2, 3080, summary__training_time_s=102.0),
]


def test_a_contrast_of_two_methods():
    taken = sample(PAIR)
    assert (taken.seeds, taken.values.tolist()) == ((1, 2), [0.01, 0.02])
    assert sample(PAIR, measure="training_time", at_least=0.5).values.tolist() == [0.0, 0.0]


def test_weights_of_three_methods():
    runs = [make_run("lora", 1, 2000), make_run("adalora", 1, 3000), make_run("proposed", 1, 2900)]
    taken = sample(runs, contrast={"proposed": 1, "adalora": -0.75, "lora": -0.25})
    assert taken.values.tolist() == [(2900 - 0.75 * 3000 - 0.25 * 2000) / 4000]


@pytest.mark.parametrize(
    ("extra", "claim", "reason"),
    [
        ([], {"contrast": {"proposed": 1, "adalora": -1}}, "no runs of AdaLoRA"),
        (
            [rename(make_run("proposed", 1, 3000), "other", config__run__fw_lora__lambda_fw=1.0)],
            {},
            "several variants of FW-LoRA; evaluate one of them at a time",
        ),
        (
            [make_run("control", 1, 3000, config__run__fw_lora__lambda_fw=1.0)],
            {"contrast": {"proposed": 1, "control": -1}},
            "the control's fw_lora.lambda_fw is not the method's (1.0 for control-sst2-0.2-1, 0.0001 for "
            "proposed-sst2-0.2-1)",
        ),
    ],
)
def test_what_forbids_a_contrast(extra, claim, reason: str):
    with pytest.raises(MissingMeasurementError) as raised:
        sample([*PAIR, *extra], **claim)
    assert str(raised.value) == reason


def test_only_the_claimed_variant_is_judged():
    other = [rename(make_run("proposed", s, 100), f"max{s}", config__run__fw_lora__importance="max") for s in (1, 2)]
    assert sample([*PAIR, *other]).values.tolist() == [0.01, 0.02]
    message = 'another variant than the specification\'s .fw_lora.importance = "max"'
    with pytest.raises(MissingMeasurementError, match=message):
        sample([*PAIR[:2], *other])


def test_runs_that_differ_in_more_than_the_method_are_refused():
    slower = [change(run, config__run__training__learning_rate=1.0) if "lora" in run.run_id else run for run in PAIR]
    message = "its runs differ in more than the method .unequal training settings"
    with pytest.raises(MissingMeasurementError, match=message):
        sample(slower)
    wrong = [change(PAIR[0], summary__final_eval_accuracy=0.1), *PAIR[1:]]
    with pytest.raises(MissingMeasurementError, match=r"records accuracy 0\.1000, its predictions give 0\.7500"):
        sample(wrong)
