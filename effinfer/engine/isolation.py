"""A launch that raised, again request by request: who makes it fail, fails alone.

Running rows again is exact: keys and values go where they went before, and hidden states between
loops are kept at a launch's end. Only recurrent states that a request moves on in their own slot may
have moved already in some layers; those are computed again from the request's tokens, which gives
them the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from effinfer.engine.batch import FIRST, LINE, STATE_IN, STATE_OUT, Batch, Span
from effinfer.engine.runner import Runner


def launch_one_by_one(
    runner: Runner, batch: Batch, tokens_on: Callable[[int], Sequence[int]]
) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Run each request's rows of ``batch`` as a launch of their own, after one that raised.

    Args:
        runner: whose launch it was.
        batch: the rows.
        tokens_on: the tokens of the request on a line of the block table.

    Returns:
        Float32 logits ``(wanted, vocab)``, zeros in the rows of failed requests, and by line what
        the requests that failed again raised.
    """
    logits = torch.zeros(batch.n_wanted, runner.spec.vocab_size)
    failed: dict[int, Exception] = {}
    for line in lines_of(batch):
        part, places = batch.only(line)
        try:
            if runner.spec.has_state:
                _restore_states(runner, part, tokens_on(line))
            own = runner.launch(part)
        except Exception as error:
            failed[line] = error
        else:
            if own is not None:
                logits[places] = own
    return logits, failed


def lines_of(batch: Batch) -> list[int]:
    """The lines of the block table that a batch has rows of."""
    lines: list[int] = np.unique(batch.segments[:, LINE]).tolist()
    return lines


def _restore_states(runner: Runner, batch: Batch, tokens: Sequence[int]) -> None:
    """Compute the states that a failed launch of one request's rows may have moved in their slots."""
    table, most = batch.block_table.numpy(), runner.room.max_rows
    for segment in batch.segments:
        slot = int(segment[STATE_IN])
        if slot < 0 or slot != segment[STATE_OUT]:
            continue  # from zeros, or from a slot that nothing was written to
        count, line = int(batch.positions[segment[FIRST]]), int(segment[LINE])
        for start in range(0, count, most):
            part = tokens[start : min(start + most, count)]
            state_in = slot if start else -1
            # Their keys and values are there, and blocks may be shared.
            span = Span(part, start, 0, line, state_in, slot, writes=False)
            runner.launch(Batch.of_spans([span], table, runner.spec.block_size, wanted=()))
