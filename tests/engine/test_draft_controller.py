"""What drafts cost and gain, in model time: launches are timed by a table t(n), logits by another,
so that the outcome is exact and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from effinfer import _native
from tests.engine.fake import mix

ROWS, TOKENS, LOOPS = 64, 120, 4  # tokens: per slot
# Seconds of n rows: weights read once cost as much as the arithmetic of 32 rows, of 8, of none; and
# a kernel that works in tiles of 8 rows.
COSTS = {
    "memory": [1 + max(0, n - 32) / 32 for n in range(1, ROWS + 1)],
    "mixed": [1 + n / 8 for n in range(1, ROWS + 1)],
    "compute": [n / 8 for n in range(1, ROWS + 1)],
    "tiles": [1.0 + (n + 7) // 8 for n in range(1, ROWS + 1)],
}


def text(request: int, at: int, period: int) -> int:
    """The token that a request has at a position, whatever is drafted: a text that repeats itself,
    but for one token in 16, or (period 0) never does."""
    noise = mix(request << 20 | at)
    return (at % period if period and noise % 16 else noise >> 8) % 50


def run(
    mode: str,
    costs: list[float],
    batch: int,
    *,
    loops: int = LOOPS,
    head: float = 0.0,
    exits: float = 0.0,
    right: float = 0.0,
    period: int = 0,
    tokens_each: int = TOKENS,
    **config: Any,
) -> float:
    """Model seconds until ``batch`` slots, which fill up one by one and then are never empty, have
    given so many tokens each. Rows exit early with chance ``exits``, and tell the right token after
    one loop with chance ``right``, after more rather; once right they stay so."""
    s = _native.module("_C").Scheduler(
        mode=mode,
        loops=loops,
        max_slots=batch,
        max_rows=ROWS,
        prefill_chunk=32,
        block_size=16,
        num_blocks=16 * batch,
        max_positions=256,
        costs=costs,
        head_costs=[head * t for t in costs],
        **config,
    )
    seconds, tokens = 0.0, [0] * (batch * 8)
    arrivals = iter(range(len(tokens)))
    while sum(tokens) < tokens_each * batch:
        if (i := next(arrivals, None)) is not None:
            s.submit(i, np.array([i % 7, 1, 2], np.int32), 40 + mix(i) % 40)
        rows = s.plan(seconds)
        wanted = s.n_wanted
        seconds += costs[rows - 1] + (head * costs[wanted - 1] if wanted else 0)
        chosen, leaves = np.zeros(wanted, np.int32), np.zeros(wanted, np.uint8)
        rows_wanted = zip(s.wanted[:wanted].tolist(), s.wanted_ids[:wanted].tolist(), strict=True)
        for i, (row, request) in enumerate(rows_wanted):
            at, loop = int(s.positions[row]) + 1, int(s.loops[row])
            leaves[i] = mix(request << 30 | at << 10 | loop) % 1000 < 1000 * exits
            difficulty = mix(request << 30 | at << 10 | loops) % 1000
            wrong = loop < loops - 1 and difficulty >= 1000 * right ** (1 / (loop + 1))
            chosen[i] = text(request, at, period) + wrong
        s.commit(chosen, leaves, seconds)
        for request, token, _, kind in s.events[: s.n_events].tolist():
            if kind == 0:
                assert token == text(request, 3 + tokens[request], period)
                tokens[request] += 1
    assert s.waiting > 0
    return seconds


@pytest.mark.parametrize("batch", [1, 4, 8, 32])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("head", [0.0, 0.1], ids=["free head", "head 10 %"])
def test_lossless_is_never_slower_than_full(batch: int, costs: str, head: float) -> None:
    full = run("full", COSTS[costs], batch, head=head)
    for exits, right in ((0.0, 1.0), (0.3, 0.3), (0.5, 0.7), (1.0, 0.0), (1.0, 0.9)):
        lossless = run("lossless", COSTS[costs], batch, head=head, exits=exits, right=right)
        assert full / lossless >= 0.99, (exits, right, full / lossless)


@pytest.mark.parametrize(("batch", "gain"), [(1, 2.5), (4, 2.5), (8, 2.3)])
def test_drafts_pay_where_reading_weights_is_what_costs(batch: int, gain: float) -> None:
    once: Callable[..., float] = lambda mode: run(  # noqa: E731
        mode, COSTS["memory"], batch, exits=0.8, right=0.95, tokens_each=2 * TOKENS
    )
    assert once("full") / once("lossless") >= gain


def test_nothing_is_drafted_where_arithmetic_is_what_costs() -> None:
    full = run("full", COSTS["compute"], 8)
    assert run("lossless", COSTS["compute"], 8, exits=1, right=1) == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_prompt_lookup_is_never_slower(batch: int, costs: str) -> None:
    for period in (0, 5, 40):
        once: Callable[..., float] = lambda n, p=period: run(  # noqa: E731
            "full", COSTS[costs], batch, loops=1, period=p, max_ngram=n
        )
        assert once(0) / once(4) >= 0.99, period


def test_prompt_lookup_pays_on_text_that_repeats_itself() -> None:
    plain, lookup = (
        run("full", COSTS["memory"], 1, loops=1, period=5, tokens_each=2 * TOKENS, max_ngram=n)
        for n in (0, 4)
    )
    assert plain / lookup >= 2


@pytest.mark.parametrize("batch", [1, 8])
def test_drafts_end_where_the_clock_says_that_the_costs_are_wrong(batch: int) -> None:
    """Drafts that the tables take for free make a launch take six times as long; before long none is left."""

    def seconds(launch: int, drafts: bool) -> float:
        return 1.0 + 5 * drafts

    full, _ = timed("full", batch, seconds)
    lossless, drafted = timed("lossless", batch, seconds)
    assert full / lossless >= 0.97  # the first trials are in it
    assert drafted <= 0.05


def test_drafts_come_back_when_they_pay_again() -> None:
    def seconds(launch: int, drafts: bool) -> float:
        return 1.0 + 5 * (drafts and launch < 1000)

    _, drafted = timed("lossless", 1, seconds)
    assert drafted >= 0.5


def timed(
    mode: str, batch: int, seconds: Callable[[int, bool], float], launches: int = 12_000
) -> tuple[float, float]:
    """Model seconds a token, and the share of launches with drafts, when a launch takes
    ``seconds(its number, whether it has drafts)`` whatever the tables say; all drafts are right."""
    s = _native.module("_C").Scheduler(
        mode=mode,
        loops=LOOPS,
        max_slots=batch,
        max_rows=ROWS,
        prefill_chunk=32,
        block_size=16,
        num_blocks=900 * batch,
        max_positions=13_000,
        prefix_cache=False,
        costs=[1.0] * ROWS,
        head_costs=[0.0] * ROWS,
    )
    for i in range(batch):
        s.submit(i, np.array([1], np.int32), 12_000)
    clock, tokens, drafted = 0.0, 0, 0
    for launch in range(launches):
        rows = s.plan(clock)
        wanted = s.n_wanted
        drafts = rows > batch
        drafted += drafts
        clock += seconds(launch, drafts)
        s.commit(np.full(wanted, 7, np.int32), np.ones(wanted, np.uint8), clock)
        tokens += sum(kind == 0 for *_, kind in s.events[: s.n_events].tolist())
    return clock / tokens, drafted / launches
