"""The multiple-choice knapsack: one option for each item, least loss within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

_BISECTIONS = 200  # of a multiplier; doubles have fewer bits


def choose(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The index of an option for each item: least total loss, total cost at most ``budget``.

    Exact: partial choices grow item by item, and one is dropped only where another costs and loses no
    more, or where even the Lagrangian bound of what remains cannot beat a choice already known. The
    few left near the bound make hundreds of items a matter of milliseconds to seconds; costs need no
    common unit. Of equal losses the cheaper choice wins.

    Args:
        costs: options of each item, integers 0 or more.
        losses: of the same options, finite.
        budget: in the unit of the costs.

    Raises:
        ValueError: lists of different lengths, bad numbers, or a budget below the cheapest choice.
    """
    tables = [_table(i, *item) for i, item in enumerate(zip(costs, losses, strict=True))]
    cheapest = [int(cost.min()) for cost, _ in tables]
    if sum(cheapest) > budget:
        raise ValueError(f"knapsack: budget must be at least {sum(cheapest)}, got {budget}")
    if not tables:
        return []
    cost_of, loss_of = (
        pad_sequence(list(part), batch_first=True) for part in zip(*tables, strict=True)
    )
    for i, (cost, _) in enumerate(tables):
        loss_of[i, len(cost) :] = torch.inf
    multiplier = _multiplier(cost_of, loss_of, budget)
    # What the items after each cost at least, and the least of loss + multiplier * cost they add.
    rest_cost = _sums_after(torch.tensor(cheapest))
    rest_reduced = _sums_after(_priced(cost_of, loss_of, multiplier).amin(1))
    limit = _known(cost_of, loss_of, multiplier, budget) + multiplier * budget
    # Sums of rounded numbers: a choice that equals the known one must not fall to the last bit.
    largest = max(float(loss.abs().max()) for _, loss in tables)
    limit += 1e-12 * (largest * len(tables) + multiplier * budget)

    cost = torch.zeros(1, dtype=torch.int64)
    loss = torch.zeros(1, dtype=torch.float64)
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, (option_cost, option_loss) in enumerate(tables):
        cost = (cost[:, None] + option_cost).flatten()
        loss = (loss[:, None] + option_loss).flatten()
        possible = cost + rest_cost[i] <= budget
        possible &= _priced(cost, loss, multiplier) + rest_reduced[i] <= limit
        kept = possible.nonzero().squeeze(1)
        kept = kept[_frontier(cost[kept], loss[kept])]
        cost, loss = cost[kept], loss[kept]
        history.append((kept // len(option_cost), kept % len(option_cost)))
    at = int(loss.argmin())
    chosen = []
    for parents, options in reversed(history):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1]


def _table(
    item: int, costs: Sequence[int], losses: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(costs) != len(losses) or not costs:
        raise ValueError(f"knapsack: item {item} must have as many losses as costs, and some")
    loss = torch.tensor(losses, dtype=torch.float64)
    if min(costs) < 0 or not bool(loss.isfinite().all()):
        raise ValueError(f"knapsack: costs must be 0 or more and losses finite (item {item})")
    return torch.tensor(costs, dtype=torch.int64), loss


def _frontier(cost: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Indices of the pairs that no other beats in both, by rising cost."""
    by_loss = loss.argsort(stable=True)
    order = by_loss[cost[by_loss].argsort(stable=True)]
    best = loss[order].cummin(0).values
    first = torch.ones_like(best, dtype=torch.bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]


def _sums_after(values: torch.Tensor) -> list[float]:
    """Of the values after each."""
    return [*values.flip(0).cumsum(0).flip(0)[1:].tolist(), 0]


def _priced(cost: torch.Tensor, loss: torch.Tensor, price: float) -> torch.Tensor:
    return loss + price * cost.double()  # not float32, which an integer tensor would give


def _total(values: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    return values.gather(1, picks[:, None]).sum()


def _multiplier(cost: torch.Tensor, loss: torch.Tensor, budget: int) -> float:
    """About the smallest price of a unit of cost at which what each item picks is affordable."""

    def affordable(price: float) -> bool:
        return int(_total(cost, _priced(cost, loss, price).argmin(1))) <= budget

    if affordable(0.0):
        return 0.0
    finite = loss[loss.isfinite()]
    spread = float(finite.max() - finite.min())
    low, high = 0.0, max(2 * spread, 1e-300)  # costs differ by 1 or more: the cheapest wins there
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return high


def _known(cost: torch.Tensor, loss: torch.Tensor, multiplier: float, budget: int) -> float:
    """The loss of a good affordable choice: what the price picks, then improved where it fits."""
    picks = _priced(cost, loss, multiplier).argmin(1)
    left = budget - int(_total(cost, picks))
    if left < 0:  # ties at the price: start from the cheapest
        picks = torch.where(loss.isfinite(), cost, torch.iinfo(cost.dtype).max).argmin(1)
        left = budget - int(_total(cost, picks))
    for i, pick in enumerate(picks.tolist()):
        extra = cost[i] - cost[i, pick]
        best = int(torch.where(extra <= left, loss[i], torch.inf).argmin())
        left -= int(extra[best])
        picks[i] = best
    return float(_total(loss, picks))
