"""FwLoraConfig: fields, solved ranks, and adapters that stock PEFT loads without fwlora and without a warning."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from fwlora import FisherWeightedLora, FisherWeighting, FwLoraConfig, plan_ranks, solve_ranks
from fwlora.adapters import find_adapter_pairs
from fwlora.architectures import TargetModuleError
from fwlora.budget import BudgetError
from fwlora.config import FILE_NAME
from tests.helpers.small_models import Block, make_adapted

ROBERTA = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**ROBERTA))


def test_every_mistake_of_the_fields_in_one_message():
    with pytest.raises(ValueError) as caught:
        FwLoraConfig(
            strength=-1, warmup_steps=0, decay=1.0, estimator="hessian", sketch_size=0, fisher_every=1.5,
            importance="softmax", allocation="grow", max_rank_factor=0.5, seed=-3,
        )  # fmt: skip
    message = str(caught.value)
    for told in (
        "`strength` is -1; lambda is at least 0", "`warmup_steps` is 0; give optimizer steps", "`decay` is 1.0",
        "`estimator` is 'hessian'; choose one of exact, sketch, adapter", "`sketch_size` is 0", "`fisher_every` is 1.5",
        "`importance` is 'softmax'; choose one of sum, max, mean, none", "`allocation` is 'grow'",
        "`max_rank_factor` is 0.5", "`seed` is -3",
    ):  # fmt: skip
        assert told in message
    for value in (float("nan"), float("inf"), True, "1e-4"):
        with pytest.raises(ValueError, match="`strength` is"):
            FisherWeighting(strength=value)


def test_it_is_peft_lora_to_peft():
    config = FwLoraConfig(r=4, lora_alpha=8, target_modules=["query"], warmup_steps=7)
    assert config.peft_type == "LORA" and isinstance(config, LoraConfig)
    stock, own = (get_peft_model(Block(), c) for c in (LoraConfig(r=4, lora_alpha=8, target_modules=["query"]), config))
    assert type(own.base_model) is type(stock.base_model)
    assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert FisherWeightedLora(own).options == FisherWeighting(warmup_steps=7)
    assert FisherWeightedLora(stock).options == FisherWeighting()


def test_budget_is_solved_for_the_model():
    base = roberta()
    config = FwLoraConfig.for_model(base, budget_percent=6.0, scaling=3.0, lora_dropout=0.1, strength=0.5)
    plan = plan_ranks(base, 6.0)
    assert plan.ranks == solve_ranks(plan.matrices, plan.budget)
    model = get_peft_model(base, config)
    pairs = find_adapter_pairs(model)
    assert {pair.name: pair.rank for pair in pairs} == {name: rank for name, rank in plan.ranks.items() if rank}
    assert {pair.scaling for pair in pairs} == {3.0}
    assert sum(pair.A.numel() + pair.B.numel() for pair in pairs) == plan.cost <= plan.budget
    assert (config.strength, config.lora_dropout, config.budget_percent) == (0.5, 0.1, 6.0)


def test_matrices_of_rank_zero_are_left_out():
    base = roberta()
    plan = plan_ranks(base, 1.5)
    assert set(plan.ranks.values()) == {0, 1}
    pairs = find_adapter_pairs(get_peft_model(base, FwLoraConfig.for_model(base, budget_percent=1.5)))
    assert [pair.name for pair in pairs] == [name for name, rank in plan.ranks.items() if rank]


def test_roots_of_ranks_scale_rslora_alike():
    base = roberta()
    config = FwLoraConfig.for_model(base, budget_percent=6.0, scaling=3.0, use_rslora=True)
    pairs = find_adapter_pairs(get_peft_model(base, config))
    assert len({pair.rank for pair in pairs}) == 2
    assert [pair.scaling for pair in pairs] == pytest.approx([3.0] * len(pairs))


def test_targets_may_be_named():
    base = roberta()
    config = FwLoraConfig.for_model(base, budget_percent=2.0, target_modules=["query", "attention.output"])
    ends = {name.split("layer.")[1][2:] for name in config.rank_pattern}
    assert ends == {"attention.self.query", "attention.output.dense"}
    with pytest.raises(TargetModuleError, match="matches 'qkv'"):
        FwLoraConfig.for_model(base, budget_percent=2.0, target_modules=["qkv"])
    with pytest.raises(TargetModuleError, match="Sequential has no projection of a known name; give `target_modules`"):
        plan_ranks(torch.nn.Sequential(torch.nn.Linear(3, 3)), 50.0)


def test_budgets_that_cannot_be_met_and_options_that_contradict_them():
    base = roberta()
    with pytest.raises(BudgetError, match="pay for any rank; the cheapest matrix costs 64"):
        FwLoraConfig.for_model(base, budget_percent=0.01)
    with pytest.raises(BudgetError, match="`budget_percent` is 0"):
        FwLoraConfig.for_model(base, budget_percent=0)
    with pytest.raises(
        ValueError, match=r"`lora_alpha`, `r` cannot be given beside `budget_percent`.*`scaling` sets s"
    ):
        FwLoraConfig.for_model(base, budget_percent=2.0, r=8, lora_alpha=16)
    for name, value in {"lora_bias": True, "bias": "all", "layers_to_transform": [0], "exclude_modules": ["x"]}.items():
        with pytest.raises(ValueError, match=f"`{name}` cannot be given beside `budget_percent`"):
            FwLoraConfig.for_model(base, budget_percent=2.0, **{name: value})
    for budget in ("0.2", None, True):
        with pytest.raises(BudgetError, match=f"`budget_percent` is {budget!r}; a budget is above 0"):
            FwLoraConfig.for_model(base, budget_percent=budget)
    with pytest.raises(ValueError, match="`budget_percent` is -5; a budget is above 0"):
        FwLoraConfig(budget_percent=-5)
    with pytest.raises(ValueError, match="`target_modules` is empty"):
        FwLoraConfig.for_model(base, budget_percent=2.0, target_modules=[])
    assert FwLoraConfig.for_model(base, budget_percent=2.0, target_modules="query").rank_pattern
    with pytest.raises(ValueError, match=r"`model` \(PeftModel\w*\) is adapted already"):
        FwLoraConfig.for_model(get_peft_model(roberta(), LoraConfig(target_modules=["query"])), budget_percent=2.0)
    with pytest.raises(ValueError, match="`scaling` is 0; the factor s"):
        FwLoraConfig.for_model(base, budget_percent=2.0, scaling=0)


def test_an_unsolved_budget_is_refused_on_attach():
    model = get_peft_model(roberta(), FwLoraConfig(budget_percent=0.2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"`budget_percent` is 0\.2, but its ranks were never solved.*for_model"):
        FisherWeightedLora(model)


def trained_and_saved(folder, **options):
    base = roberta()
    model = get_peft_model(base, FwLoraConfig.for_model(base, budget_percent=6.0, task_type="SEQ_CLS", **options))
    with torch.no_grad():
        for pair in find_adapter_pairs(model):
            pair.B.normal_()
    model.save_pretrained(folder)
    return model.eval()


LOAD_WITH_STOCK_PEFT = """
import sys, warnings
sys.modules["fwlora"] = None
import torch
from peft import PeftModel
from transformers import RobertaConfig, RobertaForSequenceClassification
torch.manual_seed(0)
base = RobertaForSequenceClassification(RobertaConfig(**{options!r}))
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
model = PeftModel.from_pretrained(base, {folder!r}).eval()
torch.save(model(input_ids=torch.arange(2, 22).view(2, 10)).logits, {out!r})
"""


def test_saved_adapters_load_in_stock_peft_without_fwlora_and_without_a_warning(tmp_path):
    model = trained_and_saved(tmp_path / "adapter", lora_dropout=0.1)
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()).keys()
    assert keys == json.loads(json.dumps(LoraConfig(target_modules=["x"]).to_dict(), default=list)).keys()
    script = LOAD_WITH_STOCK_PEFT.format(
        options=ROBERTA, folder=str(tmp_path / "adapter"), out=str(tmp_path / "logits.pt")
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    expected = model(input_ids=torch.arange(2, 22).view(2, 10)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_round_trip_keeps_everything(tmp_path):
    model = trained_and_saved(tmp_path, warmup_steps=9, estimator="exact", strength=0.25, seed=4)
    config = FwLoraConfig.from_pretrained(tmp_path)
    original = model.peft_config["default"]
    assert config.fisher_weighting() == original.fisher_weighting()
    assert (config.budget_percent, config.rank_pattern) == (6.0, original.rank_pattern)
    loaded = PeftModel.from_pretrained(roberta(), tmp_path, config=config, is_trainable=True).eval()
    tokens = torch.arange(2, 22).view(2, 10)
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert FisherWeightedLora(loaded).options == FisherWeighting(
        warmup_steps=9, estimator="exact", strength=0.25, seed=4
    )
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_plain_adapter_gets_the_defaults_and_broken_files_are_named(tmp_path):
    make_adapted().save_pretrained(tmp_path)
    assert FwLoraConfig.from_pretrained(tmp_path).fisher_weighting() == FisherWeighting()
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"fwlora_config\.json is not a JSON object of settings"):
        FwLoraConfig.from_pretrained(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"strength": 1, "tau": 3}')
    with pytest.raises(ValueError, match="holds unknown settings tau"):
        FwLoraConfig.from_pretrained(tmp_path)
    FwLoraConfig(target_modules=["query"], strength=0.7).save_pretrained(tmp_path / "sub")
    assert FwLoraConfig.from_pretrained(tmp_path, subfolder="sub").strength == 0.7
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        FwLoraConfig.from_pretrained(tmp_path / "nowhere")


def test_no_half_written_file_stays(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FwLoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", FILE_NAME]
