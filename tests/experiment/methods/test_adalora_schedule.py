"""AdaLoRA's schedule in run files: PEFT's steps, or the shares of the paper's run."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fwlora.experiment.methods.adalora import AdaLoraSettings


def test_the_papers_shares_of_a_run():
    """24 epochs of SST-2 give the authors' own numbers back; CoLA's three epochs scale them."""
    paper = AdaLoraSettings(schedule="proportional").fit_to(50_520)
    assert (paper.tinit, paper.tfinal, paper.deltaT) == (6_000, 22_000, 100)
    short = AdaLoraSettings(schedule="proportional").fit_to(804)
    assert (short.tinit, short.tfinal, short.deltaT) == (95, 350, 2)
    assert short.peft_schedule() == {
        "tinit": 95, "tfinal": 350, "deltaT": 2, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5
    }  # fmt: skip


def test_pefts_steps_are_taken_as_they_are():
    settings = AdaLoraSettings(tinit=3, tfinal=4, deltaT=2)
    assert settings.fit_to(1_000) == settings


def test_two_schedules_at_once_are_refused():
    with pytest.raises(ValidationError, match="`schedule` proportional decides deltaT, tinit; leave them out"):
        AdaLoraSettings(schedule="proportional", tinit=5, deltaT=3)
    assert AdaLoraSettings(schedule="proportional", tinit=0, deltaT=1).schedule == "proportional"
