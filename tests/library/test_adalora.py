"""AdaLoRA: PEFT's own arithmetic, its schedule really driven, its final cost within the parameter budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from fwlora.adalora import AdaLora, AdaLoraPlan, attach_adalora, plan_adalora
from fwlora.adapters import find_adapter_pairs, save_adapter
from fwlora.architectures import find_target_matrices
from fwlora.budget import MatrixShape

SCHEDULE = {"tinit": 2, "tfinal": 3, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
TARGETS = ["query", "value", "intermediate"]


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(config)


def make(plan: AdaLoraPlan, total_steps: int = 12, schedule=None, scaling: float = 2.0):
    model = tiny_bert()
    matrices = find_target_matrices(model, TARGETS)
    adapted = attach_adalora(
        model, matrices, plan, scaling=scaling, dropout=0.0, total_steps=total_steps, schedule=schedule or SCHEDULE,
        head_modules=["classifier"], task_type="SEQ_CLS",
    )  # fmt: skip
    return adapted, AdaLora(adapted, plan), matrices


def train_steps(model: nn.Module, method: AdaLora, steps: int, lr: float = 0.02) -> list[int]:
    """Total active rank after each step."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    history = []
    for step in range(1, steps + 1):
        tokens = torch.randint(0, 30, (8, 6))
        loss = nn.functional.cross_entropy(model(input_ids=tokens).logits, tokens[:, 0] % 2)
        term = method.loss_term()
        (loss if term is None else loss + term).backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
        history.append(sum(method.active_ranks()))
    return history


def nonzero_cost(method: AdaLora) -> int:
    """Parameters behind singular values that are not zero: counted from the weights, not from the pattern."""
    return sum(
        int((pair.E != 0).sum()) * (pair.A.shape[1] + pair.B.shape[0] + 1)
        for pair in method.pairs
        if pair.E is not None
    )


def test_ranks_fall_to_the_target_and_the_cost_fits_the_budget():
    budget = 450
    plan = plan_adalora(find_target_matrices(tiny_bert(), TARGETS), budget, mean_rank=2.0, init_rank_factor=1.5)
    # Costs per triplet: 33 for query and value, 41 for intermediate, so 35.67 on average.
    assert plan == AdaLoraPlan(init_rank=3, target_triplets=12, budget=450)
    model, method, _ = make(plan)
    history = train_steps(model, method, 12)
    assert history[0] == history[1] == 18
    assert all(earlier >= later for earlier, later in itertools.pairwise(history[1:]))
    assert history[2] < 18 and history[8] == history[-1] <= 12
    assert nonzero_cost(method) <= budget
    assert nonzero_cost(method) > budget - 2 * 41
    assert method.active_ranks() == [int((pair.E != 0).sum()) for pair in method.pairs]


def test_dropping_continues_until_the_real_cost_fits():
    plan = AdaLoraPlan(init_rank=3, target_triplets=12, budget=300)
    model, method, _ = make(plan)
    train_steps(model, method, 12)
    assert 300 - 41 < nonzero_cost(method) <= 300
    # The pattern holds through the final phase, although the optimizer goes on moving all singular values.
    assert sum(method.active_ranks()) < 10


def test_kept_triplets_are_the_most_important_ones():
    plan = AdaLoraPlan(init_rank=3, target_triplets=7, budget=10_000)
    model, method, _ = make(plan, total_steps=8, schedule={**SCHEDULE, "tfinal": 0})
    train_steps(model, method, 7)
    scores = torch.cat([method._triplet_scores(key) for key in method._pattern_keys()])
    before = torch.cat([pair.E.detach().flatten() for pair in method.pairs])
    method.after_step(8)
    kept = torch.cat([pair.E.detach().flatten() for pair in method.pairs]) != 0
    assert set(scores.topk(7).indices.tolist()) == set(torch.nonzero(kept).flatten().tolist())
    after = torch.cat([pair.E.detach().flatten() for pair in method.pairs])
    assert torch.equal(after[kept], before[kept])


def test_ties_do_not_prune_everything():
    # A first learning rate of 0 leaves every score at 0: PEFT's threshold would drop all triplets.
    plan = AdaLoraPlan(init_rank=2, target_triplets=6, budget=10_000)
    schedule = {**SCHEDULE, "tinit": 0, "tfinal": 0, "orth_reg_weight": 0.0}
    model, method, _ = make(plan, total_steps=2, schedule=schedule)
    train_steps(model, method, 1, lr=0.0)
    method.after_step(2)
    assert method.active_ranks() == [1] * 6


def test_orthogonal_term_is_what_peft_adds_to_its_loss():
    model, method, _ = make(AdaLoraPlan(3, 12, 10_000))
    for pair in method.pairs:
        pair.A.data.normal_()
        pair.B.data.normal_()
    model.eval()
    tokens = torch.randint(0, 30, (4, 6))
    output = model(input_ids=tokens, labels=torch.tensor([0, 1, 0, 1]))
    alone = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(method.loss_term(), output.loss - alone, rtol=1e-5, atol=1e-6)


def test_scaling_is_loras():
    _, method, _ = make(AdaLoraPlan(3, 12, 10_000), scaling=2.0)
    pair = method.pairs[0]
    pair.E.data.fill_(0.5)
    assert pair.scaling == pytest.approx(2.0, rel=1e-5)
    expected = 2.0 * pair.B @ (0.5 * pair.A)
    torch.testing.assert_close(pair.module.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-7)


# PEFT writes AdaLoRA's pattern under names that its own loader then calls unmatched.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_saved_adapter_gives_the_same_outputs(tmp_path):
    model, method, _ = make(AdaLoraPlan(3, 12, 450))
    train_steps(model, method, 12)
    model.eval()
    tokens = torch.randint(0, 30, (5, 6))
    expected = model(input_ids=tokens).logits
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(pair.A.shape[0] for pair in find_adapter_pairs(loaded)) == sum(method.active_ranks())


def test_plan_starts_above_its_target_and_refuses_an_empty_budget():
    matrices = [MatrixShape("layer.0.a", 10, 10), MatrixShape("layer.1.a", 10, 10)]
    assert plan_adalora(matrices, 84, mean_rank=2.0, init_rank_factor=1.0) == AdaLoraPlan(3, 4, 84)
    with pytest.raises(ValueError, match="pay for no AdaLoRA triplet; the cheapest costs 21"):
        plan_adalora(matrices, 20, mean_rank=0.5, init_rank_factor=1.5)


def test_a_schedule_without_room_is_refused():
    with pytest.raises(ValueError, match="budgeting phase"):
        make(AdaLoraPlan(3, 12, 450), total_steps=5)
    with pytest.raises(ValueError, match="ends at step 1; it needs at least 2"):
        make(AdaLoraPlan(3, 12, 450), total_steps=1, schedule={**SCHEDULE, "tinit": 0, "tfinal": 0})
