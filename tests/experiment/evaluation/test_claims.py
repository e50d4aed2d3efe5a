"""Claims as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fwlora.experiment.errors import UserError
from fwlora.experiment.evaluation.claims.claim import load_claims
from tests.helpers.paths import REPOSITORY

CLAIMS = REPOSITORY / "config" / "claims"


def test_every_claim_of_the_repository_is_read_and_quotes_the_specification():
    claims = load_claims(CLAIMS)
    assert [claim.order for claim in claims.values()] == list(range(1, len(claims) + 1))
    measures = {claim.measure for claim in claims.values()}
    assert measures == {"quality", "training_time", "update_norm"}
    contrasts = [claim.contrast for claim in claims.values()]
    assert {"proposed": 1, "control": -1} in contrasts and {"proposed": 1, "lora": -1} in contrasts
    specification = REPOSITORY.parent / "shared" / "spec" / "specification.md"
    if specification.is_file():
        text = " ".join(specification.read_text().split())
        for name, claim in claims.items():
            assert all(part.strip() in text for part in claim.quote.split("[...]")), name


def test_all_mistakes_of_all_claim_files_are_reported_at_once(tmp_path: Path):
    good = yaml.safe_load((CLAIMS / "above-lora.yaml").read_text())
    broken = {
        "bounds": {**good, "at_least": None},
        "order": {**good, "at_least": 1, "at_most": 1},
        "weights": {**good, "contrast": {"proposed": 1, "lora": -0.5}},
        "role": {**good, "contrast": {"proposed": 1, "dora": -1}},
        "unknown": {**good, "bound": 3},
        "budgets": {**good, "budgets": []},
        "number": {**good, "order": "one"},
        "zero": {**good, "contrast": {"adalora": 0, "lora": 0}},
        "modules": {**good, "measure": "update_norm"},
        "ratio": {**good, "measure": "training_time", "at_least": 0},
        "requires": {**good, "requires": "nothing"},
        "premise": {**good, "requires": "good"},
        "chain": {**good, "requires": "premise"},
    }
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(good))
    for name, content in broken.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "old.yml").write_text(yaml.safe_dump(good))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "syntax.yaml").write_text("a: [")
    with pytest.raises(UserError) as raised:
        load_claims(tmp_path)
    message = str(raised.value)
    for expected in (
        "bounds.yaml: at_least or at_most is needed",
        "order.yaml: at_least (1.0) must be below at_most (1.0)",
        "weights.yaml: contrast needs two roles or more whose weights are not 0 and sum to 0",
        "role.yaml: contrast.dora",
        "unknown.yaml: bound: unknown key",
        "modules.yaml: modules goes with measure: update_norm",
        "ratio.yaml: a bound of a ratio must be positive",
        "requires.yaml: requires 'nothing', which is none of",
        "chain.yaml: requires 'premise', which requires another claim itself",
        "list.yaml: is not a mapping",
        "syntax.yaml: cannot be read: line 1, column 5: ",
        "budgets.yaml: budgets = []: list should have at least 1 item",
        "number.yaml: order = 'one': input should be a valid integer",
        "zero.yaml: contrast needs two roles or more whose weights are not 0",
        "old.yml: claims end in .yaml; rename it",
    ):
        assert expected in message, message
    assert "good.yaml:" not in message and "premise.yaml:" not in message


def test_no_claims_are_no_mistake(tmp_path: Path):
    assert load_claims(tmp_path) == {}
