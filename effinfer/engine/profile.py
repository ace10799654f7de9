"""What a launch costs: t(n), measured when a model is loaded."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch

from effinfer.engine import sampling
from effinfer.engine.batch import Batch, Span
from effinfer.engine.policies import ExitPolicy, ExitRows
from effinfer.engine.runner import Runner

_SECONDS = 0.3  # for all sizes together, where one round of launches does not take longer
_ROUNDS = 5


def measure_costs(
    runner: Runner, max_rows: int, policy: ExitPolicy | None = None
) -> tuple[list[float], list[float]]:
    """Seconds of a launch of n rows, and of the logits of n rows, for n = 1 .. ``max_rows``; logits
    include what is done with them: the most probable token, and the policy's scores.

    Measured at n = 1, 2, 4, ... up to as many as fit the memory, between these on straight lines, and
    never falling. Rows are one position each of as many sequences as there are lines, or several
    where there are more rows, and at all loops, where there are several. Blocks and state slots are written: measure before any is in use.

    Args:
        runner: with memory allocated.
        max_rows: at most what it was allocated for.
        policy: that will be asked about every row with logits.
    """

    def run(batch: Batch) -> None:
        logits = runner.launch(batch)
        if logits is not None:
            _choose(runner, policy, logits)

    most = min(max_rows, _room(runner))
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    batches = [_batch(runner, n, wanted) for n in sizes for wanted in (0, n)]
    for batch in batches:  # the first launch of a size makes its views
        run(batch)
    seconds = np.full(len(batches), np.inf)
    end = perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        # All in turn, so that what disturbs the machine disturbs all alike.
        for i, batch in enumerate(batches):
            start = perf_counter()
            run(batch)
            seconds[i] = min(seconds[i], perf_counter() - start)
        if perf_counter() > end:
            break
    without, logits = seconds[::2], seconds[1::2] - seconds[::2]
    every = range(1, max_rows + 1)
    launch, head = (
        np.interp(every, sizes, np.maximum.accumulate(np.maximum(part, 0))).tolist()
        for part in (without, logits)
    )
    return launch, head


def _choose(runner: Runner, policy: ExitPolicy | None, logits: torch.Tensor) -> None:
    """What is done with logits, for rows of no request."""
    top, _ = sampling.greedy(logits)
    if policy is None:
        return
    none = np.full(len(top), -1)
    arena = np.arange(len(top))
    policy.decide(
        ExitRows(
            logits=logits,
            top=top,
            loops=np.zeros_like(none),
            positions=none,
            requests=none,
            arena=arena,
            hidden=lambda: runner.hidden(torch.from_numpy(arena)),
        )
    )


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
    spans = []
    for line in range(lines):
        count = min(per_line, rows - line * per_line)
        if count > 0:
            loop = line * spec.loops // lines  # all loops alike
            spans.append(Span([0] * count, 0, loop, line, state_out=line))
    return Batch.of_spans(spans, table, spec.block_size, wanted=range(wanted))
