"""Each pattern matches its own matrix: models whose paths contain one another, and what PEFT loads of them."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fwlora import FisherWeightedLora, FisherWeighting, FwLoraConfig, attach_lora, plan_ranks
from fwlora.adalora import attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs


class Tower(nn.Module):
    """Modules under the names of a tree; the tests call the matrices themselves."""

    def __init__(self, tree: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in tree.items():
            self.add_module(name, module)


def block(width: int = 6) -> nn.ModuleDict:
    return nn.ModuleDict({"query": nn.Linear(width, width), "value": nn.Linear(width, width)})


TREES = {
    "one encoder inside another's path": lambda: {"left": block(), "model": nn.ModuleDict({"left": block()})},
    "nested containers": lambda: {
        "0": nn.Linear(6, 6), "a": nn.Sequential(nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6)]))
    },
    "parentheses": lambda: {"q(1)": nn.Linear(6, 6), "q1": nn.Linear(6, 6)},
    "a dot that is a wildcard": lambda: {"a": nn.ModuleDict({"q": nn.Linear(6, 6)}), "a_q": nn.Linear(6, 6)},
    "brackets and a plus": lambda: {"v[0]+": nn.Linear(6, 6), "v00": nn.Linear(6, 6)},
    "a container that ends alike": lambda: {
        "fc": nn.Linear(6, 6), "deep": nn.ModuleDict({"fc": nn.ModuleDict({"out": nn.Linear(6, 6)})})
    },
}  # fmt: skip


def make(tree: str) -> Tower:
    torch.manual_seed(0)
    return Tower(TREES[tree]())


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def attached_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Sum the outputs of all matrices, adapted or not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [m for n, m in base.named_modules() if n in names_of(base)]
    return torch.stack([layer(x) for layer in layers]).sum(0)


def names_of(base: nn.Module) -> list[str]:
    """Paths of matrices, whether or not they carry an adapter."""
    return [
        name for name, module in base.named_modules()
        if hasattr(module, "base_layer") or (isinstance(module, nn.Linear) and not re.search("base_layer|lora_", name))
    ]  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("percent", [16.0, 35.0, 70.0])
def test_what_is_planned_is_attached_and_loaded(tree, percent, tmp_path):
    model = make(tree)
    names = linear_names(model)
    plan = plan_ranks(model, percent, names)
    adapted = get_peft_model(model, FwLoraConfig.for_model(model, budget_percent=percent, target_modules=names))
    attached = {pair.name: pair.rank for pair in find_adapter_pairs(adapted)}
    assert attached == {name: rank for name, rank in plan.ranks.items() if rank}
    assert attached_parameters(adapted) == plan.cost <= plan.budget
    FisherWeightedLora(adapted).close()
    for pair in find_adapter_pairs(adapted):
        nn.init.normal_(pair.B)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(tree), tmp_path)
    x = torch.randn(3, 6)
    torch.testing.assert_close(call(loaded, x), call(adapted, x), rtol=0, atol=0)


@pytest.mark.parametrize("tree", TREES)
def test_the_harness_attaches_the_plan_too(tree):
    names = linear_names(make(tree))
    plan = plan_ranks(make(tree), 35.0, names)
    adapted = attach_lora(make(tree), plan.ranks, scaling=2.0, dropout=0.0)
    assert attached_parameters(adapted) == plan.cost
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1}
    adalora = plan_adalora(plan.matrices, plan.budget, plan.mean_rank, 1.5)
    model = attach_adalora(
        make(tree), plan.matrices, adalora, scaling=2.0, dropout=0.0, total_steps=9, schedule=schedule
    )
    assert {pair.name: pair.rank for pair in find_adapter_pairs(model)} == dict.fromkeys(names, adalora.init_rank)


@pytest.mark.parametrize("tree", TREES)
def test_reallocated_adapters_of_such_models_load_in_peft(tree, tmp_path):
    adapted = attach_lora(make(tree), dict.fromkeys(linear_names(make(tree)), 1), scaling=2.0, dropout=0.0)
    options = FisherWeighting(warmup_steps=1, allocation="reallocate", estimator="exact", max_rank_factor=4.0)
    fw = FisherWeightedLora(adapted, options)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 6)
    for weight, name in zip((1.0, 30.0, 1.0, 30.0), names_of(adapted.get_base_model()), strict=False):
        (weight * adapted.get_base_model().get_submodule(name)(x)).square().sum().backward()
    fw.step(optimizer)
    ranks = {pair.name: pair.rank for pair in fw.pairs}
    assert set(ranks.values()) != {1}
    for pair in fw.pairs:
        nn.init.normal_(pair.B)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(tree), tmp_path)
    assert {p.name: p.rank for p in find_adapter_pairs(loaded)} == {n: r for n, r in ranks.items() if r}
    torch.testing.assert_close(call(loaded, x), call(adapted, x), rtol=1e-6, atol=1e-6)


def test_plain_names_stay_plain_and_a_model_without_ambiguity_is_saved_readably():
    model = Tower({"encoder": nn.ModuleDict({"layer_0": block(), "layer_1": block()})})
    config = FwLoraConfig.for_model(model, budget_percent=35.0, target_modules=["query", "value"])
    assert set(config.target_modules) == set(config.rank_pattern) == set(linear_names(model))


def test_another_model_than_the_planned_one_is_refused():
    config = FwLoraConfig.for_model(Tower({"left": block()}), budget_percent=35.0, target_modules=["query", "value"])
    other = get_peft_model(Tower({"left": block(), "model": nn.ModuleDict({"left": block()})}), config)
    with pytest.raises(ValueError, match=r"not the one that .*planned.*'model\.left\.query' carries an adapter"):
        FisherWeightedLora(other)
    config = FwLoraConfig.for_model(Tower({"left": block()}), budget_percent=60.0, target_modules=["query", "value"])
    adapted = get_peft_model(Tower({"left": block()}), config)
    config.rank_pattern["left.query"] += 1
    with pytest.raises(ValueError, match=r"'left\.query' carries rank"):
        FisherWeightedLora(adapted)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
def test_a_head_whose_name_ends_a_matrix_of_the_encoder_is_refused():
    def make_model() -> Tower:
        return Tower(
            {
                "encoder": nn.ModuleDict({"score": nn.Linear(6, 6), "query": nn.Linear(6, 6)}),
                "score": nn.Linear(6, 2),
            }
        )

    options = {"scaling": 1.0, "dropout": 0.0, "head_modules": ["score"]}
    with pytest.raises(ValueError, match=r"PEFT trains 'encoder\.score' in full"):
        attach_lora(make_model(), {"encoder.query": 1}, **options)
    with pytest.raises(ValueError, match=r"PEFT gave 'encoder\.score' rank 0 instead of 1"):
        attach_lora(make_model(), {"encoder.query": 1, "encoder.score": 1}, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainable_token_indices", [1, 2, 3]), ("use_dora", True), ("lora_bias", True), ("bias", "lora_only"),
        ("layer_replication", [(0, 1)]), ("target_parameters", ["weight"]), ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
    ],
)  # fmt: skip
def test_options_with_parameters_beside_the_budget_are_refused(option, value):
    model = Tower({"left": block()})
    with pytest.raises(ValueError, match=f"`{option}` cannot be given beside `budget_percent`.*counts the parameters"):
        FwLoraConfig.for_model(model, budget_percent=35.0, target_modules=["query"], **{option: value})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "OLoRA"])
def test_starts_that_change_the_pretrained_weight_are_refused(start):
    adapted = get_peft_model(
        Tower({"left": block()}), LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=start)
    )
    with pytest.raises(ValueError, match=f"`init_lora_weights` is '{start}', which subtracts"):
        FisherWeightedLora(adapted)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_starts_that_keep_it_are_measured_and_reallocated_and_load_in_peft(start, tmp_path):
    torch.manual_seed(0)
    base = Tower({"left": block()})
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=start))
    options = FisherWeighting(warmup_steps=1, allocation="reallocate", estimator="exact", max_rank_factor=1.5)
    fw = FisherWeightedLora(adapted, options)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 6)
    left = adapted.get_base_model().left
    (left["query"](x).square().sum() * 20 + left["value"](x).square().sum()).backward()
    fw.step(optimizer)
    assert sorted(pair.rank for pair in fw.pairs) == [1, 3]
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Tower({"left": block()}), tmp_path)
    torch.testing.assert_close(call(loaded, x), call(adapted, x), rtol=1e-6, atol=1e-6)


def test_an_orthogonal_start_within_a_budget_of_odd_ranks_is_refused():
    model = Tower({"left": block()})
    with pytest.raises(ValueError, match="'orthogonal', which needs even ranks, but the budget gives"):
        FwLoraConfig.for_model(
            model, budget_percent=30.0, target_modules=["query", "value"], init_lora_weights="orthogonal"
        )


@pytest.mark.parametrize(("option", "value"), [("bias", "all"), ("bias", "lora_only"), ("lora_bias", True)])
def test_biases_that_a_reallocation_could_lose_are_refused(option, value):
    config = LoraConfig(r=2, target_modules=["query", "value"], **{option: value})
    adapted = get_peft_model(Tower({"left": block()}), config)
    with pytest.raises(ValueError, match=f"`{option}` is .*whose rank becomes 0"):
        FisherWeightedLora(adapted, FisherWeighting(allocation="reallocate"))
    FisherWeightedLora(adapted).close()


def test_a_trained_adapter_without_options_says_that_it_goes_on_with_the_defaults(caplog, tmp_path):
    base = Tower({"left": block()})
    adapted = get_peft_model(base, FwLoraConfig.for_model(base, budget_percent=70.0, target_modules=["query", "value"]))
    FisherWeightedLora(adapted).close()
    for pair in find_adapter_pairs(adapted):
        nn.init.normal_(pair.B)
    adapted.save_pretrained(tmp_path)
    assert not caplog.records
    again = PeftModel.from_pretrained(Tower({"left": block()}), tmp_path, is_trainable=True)
    FisherWeightedLora(again, FisherWeighting()).close()
    assert not caplog.records
    FisherWeightedLora(again)
    assert "continuing with the defaults; load it with config=FwLoraConfig.from_pretrained" in caplog.text
