"""Depth-wise batching: tokens leave after the loops a recording says, beside every token running all.

    python -m bench.peers.engine_depth --threads 1

`effinfer` takes exits from a recording, a mean of 1.73 of 4 loops; `full` is the same engine at full
depth. Slots never empty and prompts have one token, so that all launches decode. All sides read the
same packed weights.
`judged` takes the same exits from a policy that has to see logits, so that the head runs on every row
that may exit; `loop` and `loop and head` are bare launches of as many rows, by which the bound
(F0 + R Fr) / (F0 + d Fr) is known. With `first` deeper loops leave no keys and values behind; with
`depth` those that an exit skipped are computed later, and exits save launches, not operations.

Where nothing exits, `full` is plain continuous batching: all loops in one launch of the scheduler. A run
is one token of each slot, so that the two alternate every few milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.recursive_sides import (
    LOOPS,
    Busy,
    Judged,
    Packed,
    exits,
    launches,
    random_model,
)
from bench.report_depth import bound, share_of_bound
from effinfer.engine.policies import ExitPolicy, replay
from effinfer.engine.runner import Runner
from effinfer.engine.wrappers import LockstepRunner

TOKENS = 32  # of a request
BATCHES = (1, 4, 8, 16)
FULL, JUDGED, LOOP, HEAD = "full", "judged", "loop", "loop and head"
LAUNCHES = 32  # of the bare sides, in one run


def busy(runner: Runner, batch: int, policy: ExitPolicy | None = None) -> Busy:
    mode = "full" if policy is None else "exit"
    return Busy(runner, batch, TOKENS, mode=mode, policy=policy)


def bare(model: Packed, batch: int, head: bool) -> Side:
    return Side(launches(model.runner(), batch, loop=1, head=head, count=LAUNCHES))


def mean_depth(served: Busy) -> float:
    """Loops that tokens took, of all that were served."""
    counts = np.array(served.engine.stats()["depths"])
    return float(counts @ np.arange(1, LOOPS + 1) / counts.sum())


def against_full(model: Packed, kv_policy: str, batch: int, args: argparse.Namespace) -> None:
    recorded = exits(batch, TOKENS)
    ours = busy(model.runner(), batch, replay(recorded))
    factories: dict[str, Callable[[], Side]] = {
        OURS: lambda: Side(ours.run),
        FULL: lambda: Side(busy(model.runner(), batch).run),
        JUDGED: lambda: Side(busy(model.runner(), batch, Judged(recorded)).run),
        LOOP: lambda: bare(model, batch, head=False),
        HEAD: lambda: bare(model, batch, head=True),
    }
    entry = measure(
        "engine_depth",
        f"{kv_policy}, batch {batch}, threads={args.threads}",
        factories,
        args,
        facts=lambda: {"depth": mean_depth(ours), "batch": batch, "tokens": batch * TOKENS},
    )
    if entry is not None:
        print(
            f"  mean depth {entry['depth']:.2f}; bound {bound(entry):.2f}x, "
            f"{share_of_bound(entry):.1%} of it"
        )


def a_token(served: Busy) -> Side:
    """Runs of one token of each slot."""
    served.run()
    return Side(lambda: served.run(1))


def nothing_exits(model: Packed, kv_policy: str, batch: int, args: argparse.Namespace) -> None:
    never = replay([LOOPS])
    measure(
        "engine_depth",
        f"nothing exits, {kv_policy}, batch {batch}, threads={args.threads}",
        {
            OURS: lambda: a_token(busy(model.runner(), batch, never)),
            FULL: lambda: a_token(busy(LockstepRunner(model.runner()), batch)),
        },
        args,
        facts=lambda: {"batch": batch, "tokens": batch},
    )


def main() -> None:
    args = arguments(__doc__)
    for kv_policy in ("first", "depth"):
        model = Packed(random_model(kv_policy))
        for batch in BATCHES:
            against_full(model, kv_policy, batch, args)
            nothing_exits(model, kv_policy, batch, args)


if __name__ == "__main__":
    main()
