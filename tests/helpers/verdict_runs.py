"""Made-up runs whose truth is known, and the claims to be judged on them."""

from __future__ import annotations

import numpy as np

from fwlora.experiment.evaluation.claims.claim import Claim
from fwlora.experiment.evaluation.claims.verdicts import ClaimResult, join_reasons, judge_claims
from fwlora.experiment.evaluation.compare.bootstrap import resample_runs
from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.runs import read_runs
from fwlora.experiment.tracking.records import RunRecord, pack_classes
from tests.helpers import evaluation_records as records

METHODS = {"lora": "baseline_lora", "adalora": "adalora", "proposed": "proposed_fw_lora", "control": "proposed_fw_lora"}
EXAMPLES = 4000


def make_run(role: str, seed: int, right: int, subset: str = "sst2", budget: float = 0.2, **paths) -> RunRecord:
    """A run with exactly ``right`` of 4,000 examples correct, the first ones."""
    record = records.make_record(
        f"{role}-{subset}-{budget}-{seed}", METHODS[role], seed, subset=subset, budget=budget, count=EXAMPLES
    )
    labels = records.make_labels(EXAMPLES)
    predictions = np.where(np.arange(EXAMPLES) < right, labels, 1 - labels)
    if role == "control":
        paths["config__run__fw_lora__importance"] = "none"
    changed = {
        "summary__eval_predictions": pack_classes(predictions, 2),
        "summary__final_eval_accuracy": right / EXAMPLES,
        **paths,
    }
    return records.change(record, **changed)


def make_claim(**values) -> Claim:
    stated = {"order": 1, "statement": "s", "source": "hypothesis", "quote": "q", "measure": "quality", "at_least": 0.0}
    return Claim.model_validate({**stated, "contrast": {"proposed": 1, "lora": -1}, "scope": "pooled", **values})


def judge(given, **claims):
    runs = read_runs(given)
    results = judge_claims(claims, group_cells(runs), resample_runs(runs, 0, 500), 0)
    return results[0] if len(claims) == 1 else {result.claim_id: result for result in results}


def reason_of(result: ClaimResult) -> str | None:
    return join_reasons(result.reasons)


def remedy_of(result: ClaimResult) -> str | None:
    return join_reasons(result.remedies)


def make_runs(differences, base: int = 3400, role: str = "proposed", **options) -> list[RunRecord]:
    """LoRA at ``base`` right examples, and another method ahead by that many in each seed."""
    lora = [make_run("lora", seed, base + 7 * seed, **options) for seed, _ in enumerate(differences)]
    other = [make_run(role, seed, base + 7 * seed + d, **options) for seed, d in enumerate(differences)]
    return lora + other


def with_times(times) -> list[RunRecord]:
    return [
        make_run(role, seed, 3400, summary__training_time_s=value)
        for role, values in times.items()
        for seed, value in enumerate(values)
    ]
