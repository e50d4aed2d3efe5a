"""AdaLoRA: PEFT's own arithmetic, its schedule really driven, its final cost within the parameter budget."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from fwlora.adalora import AdaLora, AdaLoraPlan, attach_adalora, plan_adalora, save_as_lora
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
    assert plan == AdaLoraPlan(init_rank=3, budget=450)
    model, method, _ = make(plan)
    history = train_steps(model, method, 12)
    assert history[0] == history[1] == 18
    assert history[2] < 18 and history[8] == history[-1] <= 13
    assert method.active_ranks() == [int((pair.E != 0).sum()) for pair in method.pairs]


def costs_of(matrices: list[MatrixShape]) -> list[int]:
    return [matrix.cost + 1 for matrix in matrices]


@pytest.mark.parametrize("budget", [300, 450, 700, 1100])
def test_every_allocation_uses_what_the_schedule_pays_for_and_no_more(budget):
    """b(t) by hand: the cubic from the initial cost to the budget; what is left is below the cheapest triplet."""
    matrices = find_target_matrices(tiny_bert(), TARGETS)
    plan = plan_adalora(matrices, budget, mean_rank=budget / sum(costs_of(matrices)), init_rank_factor=2.0)
    model, method, _ = make(plan)
    initial = plan.init_rank * sum(costs_of(matrices))
    for step in range(1, 13):
        train_steps(model, method, 0)
        tokens = torch.randint(0, 30, (8, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(input_ids=tokens).logits, tokens[:, 0] % 2).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        method.after_step(step)
        model.zero_grad()
        share = min(max((step - 2) / (12 - 3 - 2), 0.0), 1.0)
        paid = int((initial - budget) * (1 - share) ** 3 + budget)
        used = sum(rank * cost for rank, cost in zip(method.active_ranks(), costs_of(matrices), strict=True))
        assert used <= paid
        if step > 2:
            spare = [
                cost
                for cost, rank in zip(costs_of(matrices), method.active_ranks(), strict=True)
                if rank < plan.init_rank
            ]
            assert not spare or paid - used < min(spare)
    assert nonzero_cost(method) <= budget


@pytest.mark.parametrize("seed", range(5))
def test_at_the_end_98_percent_of_a_budget_are_in_use(seed):
    generator = torch.Generator().manual_seed(seed)
    model = tiny_bert()
    matrices = find_target_matrices(model, ["query", "key", "value", "intermediate", "output"])
    budget = int(torch.randint(2_000, 6_000, (), generator=generator))
    plan = plan_adalora(matrices, budget, mean_rank=budget / sum(costs_of(matrices)), init_rank_factor=1.5)
    adapted = attach_adalora(
        model, matrices, plan, scaling=2.0, dropout=0.0, total_steps=8, schedule={**SCHEDULE, "tinit": 1, "tfinal": 1}
    )
    method = AdaLora(adapted, plan)
    for pair in method.pairs:
        nn.init.normal_(pair.E, generator=generator)
    train_steps(adapted, method, 8)
    assert 0.98 * budget <= nonzero_cost(method) <= budget


def test_with_equal_costs_the_masks_are_pefts():
    targets = ["query", "key", "value"]

    def run(own: bool) -> list[dict[str, list[bool]]]:
        model = tiny_bert()
        matrices = find_target_matrices(model, targets)
        plan = AdaLoraPlan(init_rank=4, budget=9 * 33)
        adapted = attach_adalora(model, matrices, plan, scaling=2.0, dropout=0.0, total_steps=12, schedule=SCHEDULE)
        for pair in find_adapter_pairs(adapted):
            nn.init.normal_(pair.E, generator=torch.Generator().manual_seed(len(pair.name)))
        tuner, masks = adapted.base_model, []
        if not own:
            tuner.rankallocator.target_bgt = 9
        step = AdaLora(adapted, plan).after_step if own else tuner.update_and_allocate
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
        for number in range(1, 13):
            tokens = torch.randint(0, 30, (8, 6), generator=torch.Generator().manual_seed(number))
            nn.functional.cross_entropy(adapted(input_ids=tokens).logits, tokens[:, 0] % 2).backward()
            optimizer.step()
            step(number)
            optimizer.zero_grad()
            masks.append(dict(adapted.peft_config["default"].rank_pattern or {}))
        return masks

    own, pefts = run(True), run(False)
    assert own == pefts and sum(map(sum, own[-1].values())) == 9


def test_kept_triplets_are_the_most_important_ones():
    plan = AdaLoraPlan(init_rank=3, budget=7 * 41)
    model, method, _ = make(plan, total_steps=8, schedule={**SCHEDULE, "tfinal": 0})
    train_steps(model, method, 7)
    scores = method._scores.compute()
    before = torch.cat([pair.E.detach().flatten() for pair in method.pairs])
    method.after_step(8)
    kept = torch.cat([pair.E.detach().flatten() for pair in method.pairs]) != 0
    chosen, rest = set(), 7 * 41
    costs = [cost for cost, pair in zip(method._costs, method.pairs, strict=True) for _ in range(pair.rank)]
    for place in scores.argsort(descending=True, stable=True).tolist():
        if costs[place] <= rest:
            chosen.add(place)
            rest -= costs[place]
    assert chosen == set(torch.nonzero(kept).flatten().tolist()) and len(chosen) >= 7
    after = torch.cat([pair.E.detach().flatten() for pair in method.pairs])
    assert torch.equal(after[kept], before[kept])


def test_ties_do_not_prune_everything():
    # A first learning rate of 0 leaves every score at 0: PEFT's threshold would drop all triplets.
    plan = AdaLoraPlan(init_rank=2, budget=2 * 33 + 2 * 33 + 2 * 41)
    schedule = {**SCHEDULE, "tinit": 0, "tfinal": 0, "orth_reg_weight": 0.0}
    model, method, _ = make(plan, total_steps=2, schedule=schedule)
    train_steps(model, method, 1, lr=0.0)
    method.after_step(2)
    assert method.active_ranks() == [1] * 6


def test_orthogonal_term_is_what_peft_adds_to_its_loss():
    model, method, _ = make(AdaLoraPlan(3, 450))
    for pair in method.pairs:
        pair.A.data.normal_()
        pair.B.data.normal_()
    model.eval()
    tokens = torch.randint(0, 30, (4, 6))
    output = model(input_ids=tokens, labels=torch.tensor([0, 1, 0, 1]))
    alone = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(method.loss_term(), output.loss - alone, rtol=1e-5, atol=1e-6)


def test_scaling_is_loras():
    _, method, _ = make(AdaLoraPlan(3, 450), scaling=2.0)
    pair = method.pairs[0]
    pair.E.data.fill_(0.5)
    assert pair.scaling == pytest.approx(2.0, rel=1e-5)
    expected = 2.0 * pair.B @ (0.5 * pair.A)
    torch.testing.assert_close(pair.module.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-7)


# PEFT writes AdaLoRA's pattern under names that its own loader then calls unmatched.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_saved_adapter_gives_the_same_outputs(tmp_path):
    model, method, _ = make(AdaLoraPlan(3, 450))
    train_steps(model, method, 12)
    model.eval()
    tokens = torch.randint(0, 30, (5, 6))
    expected = model(input_ids=tokens).logits
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(pair.A.shape[0] for pair in find_adapter_pairs(loaded)) == sum(method.active_ranks())


def test_saved_as_lora_it_gives_the_same_outputs_everywhere(tmp_path):
    model, method, _ = make(AdaLoraPlan(3, 450))
    train_steps(model, method, 12)
    model.eval()
    tokens = torch.randint(0, 30, (5, 6))
    expected = model(input_ids=tokens).logits
    save_as_lora(model, method.pairs, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-6)
    pairs = find_adapter_pairs(loaded)
    assert {p.name: p.rank for p in pairs} == {
        p.name: r for p, r in zip(method.pairs, method.active_ranks(), strict=True) if r
    }
    assert all(pair.E is None for pair in pairs) and loaded.peft_config["default"].peft_type == "LORA"


def test_an_untrained_adapter_is_saved_too(tmp_path):
    model, method, _ = make(AdaLoraPlan(3, 450))
    for pair in method.pairs:
        nn.init.zeros_(pair.E)
    save_as_lora(model, method.pairs, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    tokens = torch.randint(0, 30, (5, 6))
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_plan_starts_above_its_target_and_refuses_an_empty_budget():
    matrices = [MatrixShape("layer.0.a", 10, 10), MatrixShape("layer.1.a", 10, 10)]
    assert plan_adalora(matrices, 84, mean_rank=2.0, init_rank_factor=1.0) == AdaLoraPlan(3, 84)
    with pytest.raises(ValueError, match="pay for no AdaLoRA triplet; the cheapest costs 21"):
        plan_adalora(matrices, 20, mean_rank=0.5, init_rank_factor=1.5)


def test_a_schedule_without_room_is_refused():
    with pytest.raises(ValueError, match="budgeting phase"):
        make(AdaLoraPlan(3, 450), total_steps=5)
    with pytest.raises(ValueError, match="ends at step 1; it needs at least 2"):
        make(AdaLoraPlan(3, 450), total_steps=1, schedule={**SCHEDULE, "tinit": 0, "tfinal": 0})


def draw_gradients(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_averages_are_pefts_to_the_last_bit():
    model, adalora, _ = make(AdaLoraPlan(init_rank=3, budget=450))
    theirs = copy.deepcopy(model.base_model.rankallocator)
    theirs.update_ipt = MethodType(type(theirs).update_ipt, theirs)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        draw_gradients(model, generator)
        theirs.update_ipt(model.base_model.model)
        model.base_model.rankallocator.update_ipt(model.base_model.model)
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        ours = getattr(model.base_model.rankallocator, name)
        expected = getattr(theirs, name)
        assert set(ours) == set(expected) and len(ours) == 3 * len(adalora.pairs)
        assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_a_triplets_score_is_pefts():
    model, adalora, _ = make(AdaLoraPlan(init_rank=3, budget=450))
    allocator = model.base_model.rankallocator
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        draw_gradients(model, generator)
        allocator.update_ipt(model.base_model.model)
    expected = []
    for pair in adalora.pairs:
        of_A, of_B, of_E = (allocator._element_score(f"{pair.name}.lora_{kind}.default") for kind in "ABE")
        pefts = torch.stack([of_A.mean(dim=1), of_B.mean(dim=0)], dim=1)
        expected.append(allocator._combine_ipt(of_E, pefts))
    torch.testing.assert_close(adalora._scores.compute(), torch.cat(expected), rtol=1e-6, atol=0)
    assert torch.cat(expected).unique().numel() == 18
