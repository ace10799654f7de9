"""Runners around a runner: one that notes its launches, one that takes its depth away."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from effinfer.engine.batch import LOOP, Batch
from effinfer.engine.runner import Room, Runner, RunnerSpec


class WrappedRunner:
    """A ``Runner`` that hands everything on to another."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.spec: RunnerSpec = inner.spec
        self.room: Room

    def allocate(
        self, *, blocks: int, states: int, max_rows: int, max_slots: int, arena_rows: int = 0
    ) -> None:
        """As ``Runner.allocate``."""
        self._inner.allocate(
            blocks=blocks,
            states=states,
            max_rows=max_rows,
            max_slots=max_slots,
            arena_rows=arena_rows,
        )
        self.room = self._inner.room

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """As ``Runner.launch``."""
        return self._inner.launch(batch)

    def propagate(self, exits: np.ndarray[Any, Any]) -> None:
        """As ``Runner.propagate``."""
        self._inner.propagate(exits)

    def copy_states(self, pairs: np.ndarray[Any, Any]) -> None:
        """As ``Runner.copy_states``."""
        self._inner.copy_states(pairs)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """As ``Runner.hidden``."""
        return self._inner.hidden(rows)

    def poison(self) -> None:
        """As ``Runner.poison``."""
        self._inner.poison()

    def close(self) -> None:
        """As ``Runner.close``."""
        self._inner.close()


class TracedRow(NamedTuple):
    """A row of a launch.

    Attributes:
        slot: the line of the block table that its request has.
        request: the request's id.
        position: in its sequence.
        loop: that it ran, from 0.
    """

    slot: int
    request: int
    position: int
    loop: int


class TracedRunner(WrappedRunner):
    """Notes what ran in each launch.

    Attributes:
        launches: the rows of each launch, in order.
    """

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner)
        self.launches: list[list[TracedRow]] = []

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """As ``Runner.launch``."""
        lines = batch.lines.numpy()
        columns = (lines, batch.line_requests[lines], batch.positions.numpy(), batch.loops.numpy())
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self.launches.append(list(map(TracedRow._make, rows)))
        return super().launch(batch)


class LockstepRunner(WrappedRunner):
    """All loops of a recursive model at once: to the scheduler a model of one loop.

    That is plain continuous batching, as of a model without loops: the rows of a launch of the
    block are all at the same depth, and a row joins when all others have gone through theirs.

    Args:
        inner: of a model without recurrent states.
    """

    def __init__(self, inner: Runner) -> None:
        if inner.spec.has_state:
            raise ValueError("LockstepRunner: inner must have no recurrent states")
        super().__init__(inner)
        self.spec = replace(inner.spec, loops=1, r_min=1)

    def allocate(
        self, *, blocks: int, states: int, max_rows: int, max_slots: int, arena_rows: int = 0
    ) -> None:
        """As ``Runner.allocate``."""
        super().allocate(
            blocks=blocks,
            states=states,
            max_rows=max_rows,
            max_slots=max_slots,
            arena_rows=max(arena_rows, max_rows),
        )
        loops = self._inner.spec.loops
        self._loops = [torch.full((max_rows,), loop, dtype=torch.int32) for loop in range(loops)]
        self._none = torch.full((max_rows,), -1, dtype=torch.int32)

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """Run every row through all loops, a launch of ``inner`` for each."""
        first_only = self._inner.spec.kv_policy == "first"
        logits = None
        for loop, loops in enumerate(self._loops):
            part = copy.copy(batch)
            part.fresh = batch.rows if loop == 0 else 0
            part.loops = loops[: batch.rows]
            part.segments = batch.segments.copy()
            part.segments[:, LOOP] = loop
            if loop + 1 < len(self._loops):
                part.want(0, 0)
            else:
                part.wanted_loops = loops[: batch.n_wanted]
            if loop > 0 and first_only:
                part.kv_slots = self._none[: batch.rows]
            logits = super().launch(part)
        return logits
