"""The knapsack against every choice there is, and at the size of real models."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.quant.knapsack import choose

# Multiples of 1/64, so that sums are exact and "optimal" needs no tolerance.
_LOSS = st.integers(-64, 4096).map(lambda i: i / 64)
_OPTION = st.tuples(st.integers(0, 40), _LOSS)
_ITEMS = st.lists(st.lists(_OPTION, min_size=1, max_size=5), max_size=6)


def total(values, chosen) -> float:
    return sum(options[i] for options, i in zip(values, chosen, strict=True))


@settings(max_examples=100, deadline=None)
@given(_ITEMS, st.integers(0, 150))
def test_optimal_and_never_over_budget(items, budget: int) -> None:
    costs = [[cost for cost, _ in item] for item in items]
    losses = [[loss for _, loss in item] for item in items]
    every = itertools.product(*(range(len(item)) for item in items))
    affordable = [total(losses, c) for c in every if total(costs, c) <= budget]
    if not affordable:
        with pytest.raises(ValueError, match="budget must be at least"):
            choose(costs, losses, budget)
        return
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == min(affordable)


def dynamic_program(costs, losses, budget: int) -> float:
    """Least loss, by the table over all budgets."""
    best = torch.full((budget + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    for item_costs, item_losses in zip(costs, losses, strict=True):
        grown = torch.full_like(best, torch.inf)
        for cost, loss in zip(item_costs, item_losses, strict=True):
            if cost <= budget:
                grown[cost:] = torch.minimum(grown[cost:], best[: budget + 1 - cost] + loss)
        best = grown
    return float(best.min())


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_hundreds_of_layers(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 30, (200,), generator=generator).tolist()
    scale = torch.rand(200, generator=generator).tolist()
    noise = torch.rand(200, 5, generator=generator)
    bits = (1, 2, 3, 4, 8)
    costs = [[size * b for b in bits] for size in sizes]
    losses = [
        [s * 4.0**-b * (0.5 + float(n[j])) for j, b in enumerate(bits)]
        for s, n in zip(scale, noise, strict=True)
    ]
    low, high = sum(sizes), 8 * sum(sizes)
    budget = int(low + share * (high - low))
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(dynamic_program(costs, losses, budget), rel=1e-12)


def test_costs_without_a_common_unit() -> None:
    """Nanoseconds: no two sums alike, where a table over budgets would have 10^10 cells."""
    generator = torch.Generator().manual_seed(2)
    costs = torch.randint(10**7, 10**8, (200, 4), generator=generator).tolist()
    losses = torch.rand(200, 4, generator=generator, dtype=torch.float64).tolist()
    budget = sum(sum(item) // 4 for item in costs)
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    greedy = [min(range(4), key=lambda i, c=c: c[i]) for c in costs]
    assert total(losses, chosen) < total(losses, greedy)


def test_of_equal_losses_the_cheaper_wins() -> None:
    assert choose([[8, 4, 2]], [[1.0, 1.0, 1.0]], 100) == [2]


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        ([[1, 2]], [[1.0]], "as many losses as costs"),
        ([[-1]], [[1.0]], "costs must be 0 or more"),
        ([[1]], [[float("nan")]], "losses finite"),
    ],
)
def test_bad_numbers(costs, losses, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(costs, losses, 10)
