from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwlora import reference
from fwlora.budget import (
    BudgetError,
    MatrixShape,
    adapter_cost,
    budget_parameters,
    reallocate_ranks,
    solve_ranks,
)


def roberta_base() -> list[MatrixShape]:
    shapes = []
    for layer in range(12):
        prefix = f"roberta.encoder.layer.{layer}"
        shapes += [MatrixShape(f"{prefix}.attention.self.{p}", 768, 768) for p in ("query", "key", "value")]
        shapes += [
            MatrixShape(f"{prefix}.intermediate.dense", 768, 3072),
            MatrixShape(f"{prefix}.output.dense", 3072, 768),
        ]
    return shapes


matrices_and_budget = st.integers(1, 3).flatmap(
    lambda kinds: st.tuples(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=kinds, max_size=kinds),
        st.integers(1, 3),
        st.integers(1, 400),
    )
)


def build(kinds: list[tuple[int, int]], depth: int) -> list[MatrixShape]:
    return [MatrixShape(f"layer.{d}.kind{k}", *shape) for d in range(depth) for k, shape in enumerate(kinds)]


def brute_force_cost(matrices: list[MatrixShape], budget: int) -> int:
    """Highest cost within the budget over all allocations whose ranks differ by at most one."""
    costs = [m.cost for m in matrices]
    best, base = 0, 0
    while base * sum(costs) <= budget:
        for raised in itertools.product((0, 1), repeat=len(costs)):
            cost = sum(c * (base + up) for c, up in zip(costs, raised, strict=True))
            if cost <= budget:
                best = max(best, cost)
        base += 1
    return best


@settings(max_examples=150, deadline=None)
@given(matrices_and_budget)
def test_uses_as_much_as_brute_force(case):
    kinds, depth, budget = case
    matrices = build(kinds, depth)
    if budget < min(m.cost for m in matrices):
        with pytest.raises(BudgetError, match="do not pay for any rank"):
            solve_ranks(matrices, budget)
        return
    ranks = solve_ranks(matrices, budget)
    assert list(ranks) == [m.name for m in matrices]
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert adapter_cost(matrices, ranks) == brute_force_cost(matrices, budget)
    assert ranks == solve_ranks(matrices, budget)


@settings(max_examples=80, deadline=None)
@given(matrices_and_budget)
def test_cost_grows_with_the_budget(case):
    kinds, depth, budget = case
    matrices = build(kinds, depth)
    smallest = min(m.cost for m in matrices)
    used = [adapter_cost(matrices, solve_ranks(matrices, b)) for b in (smallest + budget, smallest + budget + 7)]
    assert used[0] <= used[1] <= smallest + budget + 7


@pytest.mark.parametrize(("percent", "budget"), [(0.1, 124_055), (0.2, 248_110), (0.5, 620_275)])
def test_roberta_base_budgets(percent, budget):
    matrices = roberta_base()
    assert budget_parameters(percent, 124_055_040) == budget
    cost = adapter_cost(matrices, solve_ranks(matrices, budget))
    # Costs are multiples of 1536 and 3840, so of 768: no allocation comes nearer than the largest reachable multiple.
    assert budget - 768 < cost <= budget


def test_rank_one_everywhere_costs_what_the_design_says():
    assert adapter_cost(roberta_base(), {m.name: 1 for m in roberta_base()}) == 147_456


def test_remainder_is_spread_over_kind_and_depth():
    ranks = solve_ranks(roberta_base(), 248_110)
    raised = [name for name, rank in ranks.items() if rank == 2]
    per_kind = Counter(name.split(".")[-2] if name.endswith("dense") else name.split(".")[-1] for name in raised)
    assert (
        max(per_kind[k] for k in ("query", "key", "value")) - min(per_kind[k] for k in ("query", "key", "value")) <= 1
    )
    assert abs(per_kind["intermediate"] - per_kind["output"]) <= 1
    halves = Counter(int(name.split(".")[3]) // 6 for name in raised)
    assert abs(halves[0] - halves[1]) <= 3


def test_percent_is_exact_in_decimal():
    assert budget_parameters(0.7, 1000) == 7
    assert budget_parameters(100, 5) == 5


@pytest.mark.parametrize("percent", [0, -1, 100.5])
def test_refuses_percent_outside_its_range(percent):
    with pytest.raises(BudgetError, match="above 0 and at most 100"):
        budget_parameters(percent, 1000)


def test_refuses_duplicate_names():
    with pytest.raises(BudgetError, match="duplicate"):
        solve_ranks([MatrixShape("a", 2, 2), MatrixShape("a", 2, 2)], 100)


shares_of = st.floats(0, 1e6, allow_nan=False, allow_subnormal=False)


@settings(max_examples=150, deadline=None)
@given(
    matrices_and_budget,
    st.lists(shares_of, min_size=9, max_size=9),
    st.lists(st.integers(0, 5), min_size=9, max_size=9),
)
def test_reallocation_is_the_references_and_stays_within_the_budget(case, shares, caps):
    kinds, depth, budget = case
    matrices = build(kinds, depth)
    names, count = [m.name for m in matrices], len(matrices)
    by_name = dict(zip(names, shares, strict=False))
    limits = dict(zip(names, caps, strict=False))
    if not any(shares[:count]):
        with pytest.raises(BudgetError, match="not all of them 0"):
            reallocate_ranks(matrices, by_name, budget, limits)
        return
    expected = reference.proportional_ranks([m.cost for m in matrices], shares[:count], budget, caps[:count])
    if not any(expected):
        with pytest.raises(BudgetError, match="do not pay for any rank"):
            reallocate_ranks(matrices, by_name, budget, limits)
        return
    ranks = reallocate_ranks(matrices, by_name, budget, limits)
    assert list(ranks.values()) == expected
    spent = adapter_cost(matrices, ranks)
    assert spent <= budget
    assert all(ranks[name] <= limits[name] for name in names)
    # Nothing that fits is left out, and only proportions of importance count.
    assert all(ranks[m.name] == limits[m.name] or spent + m.cost > budget for m in matrices)
    assert ranks == reallocate_ranks(matrices, {k: v * 1024 for k, v in by_name.items()}, budget, limits)


def test_reallocation_by_hand():
    # Equal costs and shares 6 : 3 : 1 of ten units of rank.
    matrices = [MatrixShape(name, 5, 5) for name in "abc"]
    free = dict.fromkeys("abc", 99)
    shares = {"a": 6.0, "b": 3.0, "c": 1.0}
    assert reallocate_ranks(matrices, shares, 100, free) == {"a": 6, "b": 3, "c": 1}
    assert reallocate_ranks(matrices, shares, 105, {**free, "a": 2}) == {"a": 2, "b": 6, "c": 2}
    # Parameters, and not ranks, are what importance buys.
    wide = [MatrixShape("a", 5, 5), MatrixShape("b", 10, 10)]
    assert reallocate_ranks(wide, {"a": 1.0, "b": 1.0}, 120, {"a": 99, "b": 99}) == {"a": 6, "b": 3}


def test_reallocation_refuses_what_is_no_importance():
    matrices = [MatrixShape("a", 5, 5)]
    for bad in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(BudgetError, match="finite, at least 0, and not all of them 0"):
            reallocate_ranks(matrices, {"a": bad}, 100, {"a": 9})


@pytest.mark.parametrize(
    ("percent", "parameters", "expected"), [(50, 3, 1), (0.2, 999, 1), (33.4, 100, 33), (100, 7, 7)]
)
def test_a_budget_is_rounded_down(percent, parameters, expected):
    assert budget_parameters(percent, parameters) == expected
