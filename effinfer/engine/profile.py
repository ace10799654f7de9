"""What a launch costs: t(n), measured when a model is loaded."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from effinfer.engine.batch import Batch, Span
from effinfer.engine.runner import Runner

_SECONDS = 0.3  # for all sizes together, where one round of launches does not take longer
_ROUNDS = 5


def measure_costs(runner: Runner, max_rows: int) -> tuple[list[float], list[float]]:
    """Seconds of a launch of n rows, and of the logits of n rows, for n = 1 .. ``max_rows``.

    Measured at n = 1, 2, 4, ... and ``max_rows``, between these on straight lines, and never falling.
    Rows are one position each of as many sequences as there are lines, or several where there are
    more rows. Blocks and state slots are written: measure before any is in use.

    Args:
        runner: with memory allocated.
        max_rows: at most what it was allocated for.
    """
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(2 * sizes[-1], max_rows))
    batches = [_batch(runner, n, wanted) for n in sizes for wanted in (0, n)]
    for batch in batches:  # the first launch of a size makes its views
        runner.launch(batch)
    seconds = np.full(len(batches), np.inf)
    end = perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        # All in turn, so that what disturbs the machine disturbs all alike.
        for i, batch in enumerate(batches):
            start = perf_counter()
            runner.launch(batch)
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


def _batch(runner: Runner, rows: int, wanted: int) -> Batch:
    """``rows`` rows of as many sequences as there are lines, blocks and states for."""
    spec, room = runner.spec, runner.room
    lines = min(rows, room.max_slots)
    if spec.has_state:
        lines = min(lines, room.states)
    if spec.has_kv:
        lines = min(lines, room.blocks)
    per_line = -(-rows // lines)
    per_line_blocks = -(-per_line // spec.block_size)
    table = np.arange(lines * per_line_blocks, dtype=np.int32).reshape(lines, per_line_blocks)
    spans = []
    for line in range(lines):
        count = min(per_line, rows - line * per_line)
        if count > 0:
            spans.append(Span([0] * count, 0, line=line, state_out=line))
    return Batch.of_spans(spans, table, spec.block_size, wanted=range(wanted))
