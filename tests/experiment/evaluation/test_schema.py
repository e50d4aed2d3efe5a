"""``statistics.json`` keeps to its schema, and the schema has nothing that the document never holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from fwlora.experiment.evaluation.evidence import gather_evidence
from fwlora.experiment.evaluation.output.documents import describe_comparison, to_json
from tests.gate.evaluation_case import read_records
from tests.helpers.evaluation_records import change, make_record

SCHEMA = json.loads(
    files("fwlora.experiment.evaluation.output").joinpath("statistics.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = Draft202012Validator(SCHEMA)


def make_document(records) -> dict[str, Any]:
    evidence = gather_evidence(records, {}, resamples=20)
    return json.loads(to_json(describe_comparison(evidence.comparison, evidence.cells)))


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    pair = [make_record("p", "proposed_fw_lora"), make_record("b")]
    machines = [change(record, config__resolved__environment={"device": record.run_id}) for record in pair]
    return {
        "recorded runs": make_document(read_records()),
        "one seed": make_document(pair),
        "numbers": make_document(
            [make_record("p", "proposed_fw_lora", subset="stsb"), make_record("b", subset="stsb")]
        ),
        "one method": make_document(pair[:1]),
        "no common seed": make_document([make_record("p", "proposed_fw_lora", 1), make_record("b", seed=2)]),
        "two machines": make_document(machines),
    }


def find_objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object schema with named properties, at any depth."""
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        yield schema
    for value in schema.values():
        if isinstance(value, dict):
            yield from find_objects(value)


def collect_keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in collect_keys(item)}
    return {key for item in value for key in collect_keys(item)} if isinstance(value, list) else set()


def test_the_schema_itself_is_valid():
    Draft202012Validator.check_schema(SCHEMA)


def test_every_document_keeps_to_the_schema(documents):
    for name, document in documents.items():
        assert [error.message for error in VALIDATOR.iter_errors(document)] == [], name


def test_every_key_of_the_schema_is_written(documents):
    written = {key for document in documents.values() for key in collect_keys(document)}
    named = {key for schema in find_objects(SCHEMA) for key in schema["properties"]}
    assert named and named <= written


def test_objects_are_closed():
    assert all(schema["additionalProperties"] is False for schema in find_objects(SCHEMA))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.update(new=1),
        lambda document: document["pairs"][0].update(new=1),
        lambda document: document["pairs"][0]["per_seed"][0]["mcnemar"].update(new=1),
        lambda document: document["cells"][0]["methods"][0].pop("mean"),
        lambda document: document["holm"]["paired_t"][0].update(p_value=1.5),
        lambda document: document["pooled"][0].update(left_out=None),
    ],
)
def test_a_changed_document_is_refused(documents, spoil):
    document = copy.deepcopy(documents["recorded runs"])
    spoil(document)
    with pytest.raises(ValidationError):
        VALIDATOR.validate(document)
