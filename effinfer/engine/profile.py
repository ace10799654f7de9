"""What a launch costs: t(n), measured when a model is loaded."""

from __future__ import annotations

import functools
from time import perf_counter

import numpy as np
import torch

from effinfer.engine import sampling
from effinfer.engine.batch import Batch, Span
from effinfer.engine.greedy_exits import GreedyExits
from effinfer.engine.policies import ExitPolicy, ExitRows
from effinfer.engine.runner import Runner

_SECONDS = 0.04  # for each size, where a single launch does not take longer
_ROUNDS = 16
_FEW_ROWS = 32  # up to which sizes are measured more closely: drafts are weighed there


def measure_costs(
    runner: Runner, max_rows: int, policy: ExitPolicy | None = None
) -> tuple[list[float], list[float]]:
    """Seconds of a launch of n rows, and of the logits of n rows, for n = 1 .. ``max_rows``; logits
    include what is done with them: the most probable token, and the policy's scores.

    Measured at n = 1, 2, 3, 4, 6, 8, ... up to as many as fit the memory, between these on straight
    lines, and never falling. Rows are one position each of as many sequences as there are lines, or
    several where there are more rows, and at all loops, where there are several. Blocks and state
    slots are written: measure before any is in use.

    Args:
        runner: with memory allocated.
        max_rows: at most what it was allocated for.
        policy: that will be asked about every row with logits.
    """

    natively = GreedyExits(policy) if policy is not None and GreedyExits.judges(policy) else None

    def run(batch: Batch) -> None:
        logits = runner.launch(batch)
        if logits is not None and (natively is None or natively(logits) is None):
            _choose(runner, policy, logits)

    most = min(max_rows, _room(runner))
    sizes = [1]
    while sizes[-1] < most:
        last = sizes[-1]
        between = [3 * last // 2] if 2 <= last < min(_FEW_ROWS, most) else []
        sizes += [n for n in (*between, 2 * last) if n < most]
        if 2 * last >= most:
            sizes.append(most)
    batches = [_batch(runner, n, wanted) for n in sizes for wanted in (0, n)]
    for batch in batches:  # the first launch of a size makes its views
        run(batch)
    samples: list[list[float]] = [[] for _ in batches]
    for _ in range(_ROUNDS):
        # All in turn, so that what disturbs the machine disturbs all alike.
        for batch, taken in zip(batches, samples, strict=True):
            if sum(taken) < _SECONDS:
                start = perf_counter()
                run(batch)
                taken.append(perf_counter() - start)
    # Few are disturbed, but what only the luckiest launch reaches is no cost to count on.
    seconds = np.array([np.quantile(taken, 0.25) for taken in samples])
    without, logits = seconds[::2], np.maximum(seconds[1::2] - seconds[::2], 0)
    every = range(1, max_rows + 1)
    launch, head = (
        np.interp(every, sizes, _never_falling(part)).tolist() for part in (without, logits)
    )
    return launch, head


def _never_falling(values: np.ndarray) -> list[float]:
    """The nearest sequence that does not fall: neighbours that do are averaged (isotonic regression,
    by pooling adjacent violators)."""
    pools: list[tuple[float, int]] = []  # means, and how many values each stands for
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean = (mean * count + before * many) / (count + many)
            count += many
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _choose(runner: Runner, policy: ExitPolicy | None, logits: torch.Tensor) -> None:
    """What is done with logits, for rows of no request."""
    top = sampling.greedy(logits)
    if policy is None:
        return
    loops, none, arena = _nobody(len(top))
    policy.decide(
        ExitRows(
            logits=logits,
            top=top,
            loops=loops,
            positions=none,
            requests=none,
            arena=arena,
            hidden=lambda: runner.hidden(torch.from_numpy(arena)),
        )
    )


@functools.cache
def _nobody(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loops, positions (requests) and hidden rows of as many rows of no request."""
    return np.zeros(rows, dtype=np.int64), np.full(rows, -1), np.arange(rows)


def _lines(runner: Runner) -> int:
    """Sequences that there are lines, states and blocks for."""
    spec, room = runner.spec, runner.room
    lines = room.max_slots
    if spec.has_state:
        lines = min(lines, room.states)
    return min(lines, room.blocks) if spec.has_kv else lines


def _room(runner: Runner) -> int:
    """Rows that can have a position each."""
    spec = runner.spec
    rows = _lines(runner) * spec.max_positions
    return min(rows, runner.room.blocks * spec.block_size) if spec.has_kv else rows


def _batch(runner: Runner, rows: int, wanted: int) -> Batch:
    """``rows`` rows, of as many sequences as their blocks allow."""
    spec = runner.spec
    lines = min(rows, _lines(runner))
    while True:
        per_line = -(-rows // lines)
        blocks = -(-per_line // spec.block_size)  # of each
        if not spec.has_kv or lines * blocks <= runner.room.blocks:
            break
        lines -= 1
    table = np.arange(lines * blocks, dtype=np.int32).reshape(lines, blocks)
    runs = []  # loop, line, first position, positions
    for line in range(lines):
        count = min(per_line, rows - line * per_line)
        if lines >= spec.loops:  # all loops alike
            runs.append((line * spec.loops // lines, line, 0, count))
            continue
        cuts = [count * loop // spec.loops for loop in range(spec.loops + 1)]
        runs += [  # the first positions are the deepest, as when drafts follow a token
            (spec.loops - 1 - i, line, cuts[i], cuts[i + 1] - cuts[i]) for i in range(spec.loops)
        ]
    spans = [
        Span([0] * count, first, loop, line, state_out=line)
        for loop, line, first, count in sorted(runs)
        if count > 0
    ]
    return Batch.of_spans(spans, table, spec.block_size, wanted=range(wanted))
