from __future__ import annotations

import json

from fwlora.experiment.tracking.facts import RunFacts

FACTS = RunFacts(
    task="cola",
    label_names=("no", "yes"),
    primary_metric="eval_matthews_correlation",
    precision="fp32",
    train_examples=8,
    eval_examples=4,
    train_fingerprint="a",
    eval_fingerprint="b",
    command="python -m src.main",
    environment={"commit": "c", "packages": {"torch": "2"}},
)


def test_facts_survive_the_record_as_json():
    assert RunFacts.from_record(json.loads(json.dumps(FACTS.as_record()))) == FACTS


def test_what_older_and_newer_programs_record_can_be_read():
    assert RunFacts.from_record(None) == RunFacts.from_record({}) == RunFacts()
    recorded = {"label_names": [0, 1], "precision": None, "of_a_later_version": 1}
    assert RunFacts.from_record(recorded) == RunFacts(label_names=("0", "1"))
