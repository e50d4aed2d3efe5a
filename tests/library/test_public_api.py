"""Names, parameters and record fields that users rely on: a change here is a change for them."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

import fwlora
from fwlora.options import FisherWeighting

# Parameters of what is called, in their order; of classes those that make an object.
PARAMETERS = {
    "AdaLora": "model plan adapter_name",
    "AdaLoraCallback": "",
    "AdaLoraPlan": "init_rank budget",
    "AdapterPair": "name module A B E scaling adapter_name",
    "FisherWeightedLora": "model options adapter_name",
    "FisherWeighting": (
        "strength warmup_steps decay estimator sketch_size fisher_every importance allocation max_rank_factor seed"
    ),
    "FwLoraCallback": "options adapter_name",
    "MatrixShape": "name in_features out_features",
    "RankPlan": "matrices ranks encoder_parameters budget left_out",
    "attach_adalora": "model matrices plan scaling dropout total_steps schedule head_modules task_type",
    "attach_lora": "model ranks scaling dropout head_modules task_type",
    "budget_parameters": "percent encoder_parameters",
    "find_adapter_pairs": "model adapter_name",
    "find_target_matrices": "model targets",
    "plan_adalora": "matrices budget mean_rank init_rank_factor",
    "plan_ranks": "model budget_percent target_modules",
    "solve_ranks": "matrices budget",
}
METHODS = {
    "AdaLora.active_ranks": "",
    "AdaLora.after_step": "step",
    "AdaLora.load_state_dict": "state",
    "AdaLora.loss_term": "",
    "AdaLora.state_dict": "",
    "AdapterPair.factors": "",
    "FisherWeightedLora.close": "",
    "FisherWeightedLora.importance": "",
    "FisherWeightedLora.load_state_dict": "state",
    "FisherWeightedLora.norms": "",
    "FisherWeightedLora.penalty": "",
    "FisherWeightedLora.shrink": "loss_scale",
    "FisherWeightedLora.skipped_steps": "",
    "FisherWeightedLora.state_dict": "",
    "FisherWeightedLora.step": "optimizer loss_scale",
    "FisherWeighting.check": "",
    "FisherWeighting.fisher_weighting": "",
    "FwLoraConfig.for_model": "model budget_percent target_modules scaling options",
}
STATE = (
    "format options names shapes initial_ranks ranks steps fisher measured skipped importance"  # of FisherWeightedLora
)


def find_public(name: str) -> object:
    owner, _, attribute = name.partition(".")
    found = getattr(fwlora, owner)
    return getattr(found, attribute) if attribute else found


def test_every_name_is_pinned():
    assert set(fwlora.__all__) == {*PARAMETERS, "FwLoraConfig", "__version__"}
    methods = {
        f"{name}.{method}"
        for name in ("AdaLora", "AdapterPair", "FisherWeightedLora", "FisherWeighting")
        for method, value in vars(getattr(fwlora, name)).items()
        if inspect.isfunction(value) and not method.startswith("_")
    }
    assert methods | {"FwLoraConfig.for_model"} == set(METHODS)


@pytest.mark.parametrize(("name", "parameters"), [*PARAMETERS.items(), *METHODS.items()])
def test_parameters_keep_their_names_and_order(name, parameters):
    found = [parameter for parameter in inspect.signature(find_public(name)).parameters if parameter != "self"]
    assert found == parameters.split()


def test_a_configuration_has_the_options_and_the_budget():
    from peft import LoraConfig

    own = {field.name for field in dataclasses.fields(fwlora.FwLoraConfig)}
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    assert own - inherited == {*PARAMETERS["FisherWeighting"].split(), "budget_percent"}


def test_every_class_of_a_public_signature_is_exported():
    exported = {getattr(fwlora, name) for name in fwlora.__all__}
    for name in (*PARAMETERS, *METHODS):
        function = find_public(name)
        function = function.__init__ if inspect.isclass(function) else function
        for annotation in typing.get_type_hints(function, include_extras=True).values():
            for each in (annotation, *typing.get_args(annotation)):
                if inspect.isclass(each) and each.__module__.startswith("fwlora."):
                    assert each in exported, (name, each)


def test_defaults_are_those_of_the_documentation():
    assert dataclasses.asdict(FisherWeighting()) == {
        "strength": 1e-4, "warmup_steps": 500, "decay": 0.98, "estimator": "sketch", "sketch_size": 16,
        "fisher_every": 1, "importance": "sum", "allocation": "shrink", "max_rank_factor": 2.0, "seed": 0,
    }  # fmt: skip


def test_the_keys_of_a_saved_state():
    from tests.helpers.small_models import make_adapted

    state = fwlora.FisherWeightedLora(make_adapted()).state_dict()
    assert list(state) == STATE.split()
