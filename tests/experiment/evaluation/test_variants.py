"""What runs are compared as, from the registry of methods alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from fwlora.experiment.evaluation.compare.cells import group_cells
from fwlora.experiment.evaluation.compare.runs import Budget, read_runs
from fwlora.experiment.evaluation.compare.settings import (
    flatten_settings,
    format_setting,
    list_distinct,
    shorten_setting,
)
from fwlora.experiment.evaluation.compare.variants import known_roles, label_role
from fwlora.experiment.methods import Variant, register_method, unregister_method
from fwlora.experiment.methods.lora import LoraSpec
from fwlora.experiment.settings.schema import run_settings_class
from tests.helpers.evaluation_records import change, make_record


class DoraSpec(LoraSpec):
    """A method that nothing in the package names."""

    name = "dora"
    variants = (Variant("dora", "DoRA", "baseline", 5),)


@pytest.fixture
def dora() -> Iterator[None]:
    register_method(DoraSpec())
    yield
    unregister_method("dora")


def label_groups(*records) -> list[tuple[str, str]]:
    (cell,) = group_cells(read_runs(records))
    return [(group.label, group.role) for group in cell.groups]


def test_a_method_that_is_not_registered_keeps_its_recorded_name():
    groups = label_groups(make_record("p", "proposed_fw_lora"), make_record("d", "dora"), make_record("l"))
    assert groups == [("LoRA", "lora"), ("dora", "other"), ("FW-LoRA", "proposed")]


@pytest.mark.usefixtures("dora")
def test_a_registered_method_brings_its_label_and_role():
    groups = label_groups(make_record("p", "proposed_fw_lora"), make_record("d", "dora"), make_record("l"))
    assert groups == [("LoRA", "lora"), ("DoRA", "dora"), ("FW-LoRA", "proposed")]
    assert (label_role("dora"), known_roles()["dora"]) == ("DoRA", "DoRA")
    assert label_role("unknown") == "unknown"


def test_settings_are_read_without_validation():
    node = {"method": "m", "unknown": 1, "fw_lora": {"importance": "other"}, "optuna": {"n_trials": 3}}
    run = run_settings_class().from_record(node)
    assert (run.method, run.optuna.n_trials, run.fw_lora.importance, run.adalora) == ("m", 3, "other", None)
    assert (run.model.lora.rank, run.optuna.search_space, run.fw_lora.allocation) == (None, None, "shrink")
    with pytest.raises(AttributeError):
        run_settings_class().from_record({"model": ["roberta"]})


def test_settings_are_compared_as_values_and_shown_as_json():
    flat = flatten_settings({"a": {"b": 1.0, "c": None}, "d": [1, "x"], "optuna": {"search_space": {"y": 1}}})
    assert flat == {"a.b": 1, "d": [1, "x"], "optuna.search_space": {"y": 1}}
    assert [format_setting(value) for value in (1.0, "x", [1.0], None)] == ["1", '"x"', "[1]", "None"]
    assert (shorten_setting("x"), shorten_setting(None)) == ("x", "unset")
    assert shorten_setting("x" * 25).startswith("#") and len(shorten_setting("x" * 25)) == 7
    assert list_distinct([[1], [2], [1.0], None, None]) == [[1], [2], None]


def test_budgets_are_shares_or_ranks():
    assert (str(Budget(percent=0.2)), Budget(percent=0.2).number) == ("0.2 %", 0.2)
    assert (str(Budget(rank=8)), Budget(rank=8).number) == ("rank 8", 8.0)
    assert (str(Budget(rank=8, searched=True)), str(Budget())) == ("rank searched", "rank None")
    ranked = change(make_record("r"), config__run__model__budget_mode="rank")
    (run,) = read_runs([ranked])
    assert run.cell_key.budget == Budget(rank=8) and run.cell_key.display() == "glue/sst2, roberta-base, rank 8"


def test_a_run_that_was_sent_to_another_process_keeps_its_settings():
    uniform = change(make_record("u", "proposed_fw_lora"), config__run__fw_lora__importance="none")
    (run,) = pickle.loads(pickle.dumps(read_runs([uniform])))
    assert run.variant == Variant("control", "uniform shrinkage", "control", 3)
    assert (run.run.training.batch_size, run.run.method_settings.importance) == (32, "none")
