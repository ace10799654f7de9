"""Rows of depth-wise batching in the speed table: exits, drafts, additions of the loops, latency."""

from __future__ import annotations

from typing import Any

from bench.report_claims import Claim, Goal, load

LOOPS = 4
THREADS = (1, 2)


def bound(entry: dict[str, Any]) -> float:
    """How much faster exits can make tokens, (F0 + R Fr) / (F0 + d Fr): F0 is the head's time, Fr a
    loop's, as measured by bare launches of as many rows; d the mean depth."""
    ms = {name: spread["median"] for name, spread in entry["ms"].items()}
    loop, head = ms["loop"], ms["loop and head"] - ms["loop"]
    return float((head + LOOPS * loop) / (head + entry["depth"] * loop))


def share_of_bound(entry: dict[str, Any], side: str = "effinfer") -> float:
    """What of the bound a side reaches."""
    ms = entry["ms"]
    return float(ms["full"]["median"] / ms[side]["median"] / bound(entry))


def _exits(kv_policy: str, batch: int, threads: int, goal: float | None) -> Claim:
    def value() -> float:
        case = load("engine_depth")[f"{kv_policy}, batch {batch}, threads={threads}"]
        return 100 * share_of_bound(case)

    return Claim(f"{kv_policy}, batch {batch}: {{:.0f}} % ({threads}T)", value, goal)


def _nothing_exits(kv_policy: str, batch: int, threads: int) -> Claim:
    def loss() -> float:
        name = f"nothing exits, {kv_policy}, batch {batch}, threads={threads}"
        return 100 * (1 / load("engine_depth")[name]["ratio"]["full"]["median"] - 1)

    return Claim(f"{kv_policy}, batch {batch}: {{:+.1f}} % ({threads}T)", loss, at_most=1)


def _lossless(name: str, batch: int, threads: int, goal: float) -> Claim:
    def value() -> float:
        case = load("engine_lossless")[f"{name}, batch {batch}, threads={threads}"]
        return float(case["ratio"]["full"]["median"])

    return Claim(f"{name}, batch {batch}: {{:.2f}}x ({threads}T)", value, goal)


def _additions(rank: int, batch: int, threads: int) -> Claim:
    def cost() -> float:
        case = load("engine_lora")[f"rank {rank}, batch {batch}, threads={threads}"]
        return 100 * (1 / case["ratio"]["without"]["median"] - 1)

    return Claim(f"rank {rank}, batch {batch}: {{:+.1f}} % ({threads}T)", cost, at_most=5)


def _latency(load_: float, threads: int) -> Claim:
    def ratio() -> float:
        return float(
            load("engine_latency")[f"first, load {load_}, threads={threads}"]["ours_over_full"]
        )

    return Claim(f"{{:.2f}}x at load {load_} ({threads}T)", ratio, at_most=0.6)


def goals() -> list[Goal]:
    batches = (1, 4, 8, 16)
    wanted = {1: 1.8, 4: 1.5, 8: 1.25}
    models = ("carried, 4 loops", "carried, 2 loops", "30 M, sure drafts", "30 M, all drafts")
    never_slower = (
        *((name, batch) for name in models[:2] for batch in (16, 64)),
        *(("30 M, wrong drafts", batch) for batch in (1, 4, 8, 16)),
    )
    return [
        (
            "depth-wise over plain continuous batching, replayed exits, a mean of 1.73 of 4 loops",
            "90 % of the bound, batch 1 to 16",
            [_exits("first", b, t, 90) for t in THREADS for b in batches]
            + [_exits("depth", b, t, None) for t in THREADS for b in batches],
        ),
        (
            "nothing exits",
            "at most 1 % loss",
            [_nothing_exits(k, b, t) for t in THREADS for k in ("first", "depth") for b in batches],
        ),
        (
            "`lossless` over `full`",
            "1.8x / 1.5x / 1.25x at batch 1 / 4 / 8; never under 0.99x",
            [_lossless(n, b, t, g) for t in THREADS for n in models for b, g in wanted.items()]
            + [_lossless(n, b, t, 0.99) for t in THREADS for n, b in never_slower],
        ),
        (
            "the loops' low-rank additions, launches of mixed loops, 768 wide",
            "at most 5 % at a rank of 5 % of the width (38)",
            [_additions(r, b, t) for t in THREADS for r in (6, 38) for b in (1, 4, 16)],
        ),
        (
            "seconds a token from arrival, depth-wise over plain, Poisson arrivals",
            "at most 0.6x",
            [_latency(load_, t) for t in THREADS for load_ in (0.6, 0.75, 0.9)],
        ),
    ]
