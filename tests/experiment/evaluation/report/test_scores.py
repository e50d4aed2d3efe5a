"""The first screen's sentence and its lines, computed."""

from __future__ import annotations

import numpy as np
import pytest

from fwlora.experiment.evaluation.claims.verdicts import group_undecided
from fwlora.experiment.evaluation.evidence import Evidence, gather_evidence
from fwlora.experiment.evaluation.report.scores import (
    LINE_WIDTH,
    arrange_scores,
    write_lead,
)
from fwlora.experiment.tracking.records import pack_classes
from tests.helpers.evaluation_records import change, make_record
from tests.helpers.verdict_runs import make_claim, make_runs


def gather(given, **claims) -> Evidence:
    return gather_evidence(given, claims, resamples=100)


def test_means_and_intervals_lie_on_one_scale():
    found = gather(make_runs([100, 130, 90]))
    (cell,) = found.cells
    lines = arrange_scores(cell, found.means)
    lora, proposed = lines.rows
    assert (lora.best, proposed.best, lora.unlearned) == (False, True, 0)
    first, second = (found.means[cell.name, label] for label in ("LoRA", "FW-LoRA"))
    # The line is linear in the score: distances stand in the ratio of the values.
    per_point = (proposed.value - lora.value) / (second.mean - first.mean)
    assert proposed.interval[1] - proposed.interval[0] == pytest.approx(per_point * (second.high - second.low), abs=0.2)
    assert 0 <= lora.interval[0] < lora.value < lora.interval[1] <= LINE_WIDTH
    assert lora.text == f"{100 * first.mean:.1f} [{100 * first.low:.1f}, {100 * first.high:.1f}], 3 seeds"
    ((name, place),) = lines.references
    assert name.startswith("always predicting") and place < lora.value


def test_the_sentence_names_winners_verdicts_and_runs_that_did_not_learn():
    given = (
        make_runs([100, 130, 90, 110])
        + make_runs([-30, -20, -25, -30], budget=0.5)
        + make_runs([9, 9, 8, 9], budget=0.1)
    )
    found = gather(given, a=make_claim(), b=make_claim(budgets=[9.0]))
    lead = write_lead(found.cells, found.claim_results)
    assert lead == (
        "FW-LoRA has the highest mean in 2 of 3 cells and LoRA in 1; of 2 claims, 1 supported and 1 undecided."
    )
    wrong = change(
        make_record("w"), summary__eval_predictions=pack_classes(np.ones(400, dtype=int), 2),
        summary__final_eval_accuracy=0.1, summary__final_eval_matthews_correlation=0.0,
    )  # fmt: skip
    single = gather([wrong, make_record("p", "proposed_fw_lora")])
    assert write_lead(single.cells, []) == "FW-LoRA has the highest mean; 1 run did not learn: w."


def test_reasons_are_grouped_over_claims():
    found = gather(make_runs([100]), a=make_claim(), b=make_claim(at_least=1.0), c=make_claim(budgets=[9.0]))
    (first, second) = group_undecided(found.claim_results)
    assert first == ("no seed-level test possible: one paired seed", "two seeds at least", ["a", "b"])
    assert second == ("no runs at a budget of 9 %", "runs at that budget", ["c"])
