"""One launch's rows, as views over the buffers that the scheduler fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROW_FIELDS = ("tokens", "positions", "loops", "arena", "lines", "kv_slots")
WANTED_FIELDS = ("wanted", "wanted_loops")
# Columns of ``segments``.
FIRST, ROWS, LOOP, LINE, STATE_IN, STATE_OUT = range(6)


@dataclass(frozen=True)
class Span:
    """Consecutive positions of one sequence at one loop: one segment of a batch.

    Attributes:
        tokens: of the positions.
        start: the first position.
        loop, line: the loop to run, and the sequence's line of the block table.
        state_in, state_out: slots of recurrent states, read (-1: zeros) and written.
        arena: the first position's hidden-arena row; None for the rows' own numbers.
        writes: whether keys and values are written.
    """

    tokens: Sequence[int]
    start: int
    loop: int = 0
    line: int = 0
    state_in: int = -1
    state_out: int = 0
    arena: int | None = None
    writes: bool = True


class Batch:
    """What a runner is to compute in one launch.

    Made once over a scheduler (or anything with its arrays) and resized before each launch; nothing
    is copied but the wanted rows' numbers.

    Attributes:
        tokens, positions, loops, arena, lines, kv_slots: ``(rows,)`` int32, for each row its token
            (read in loop 0), position, loop, hidden-arena row, line of the block table, and slot
            ``block * block_size + offset`` to write keys and values to (-1: none). Rows are sorted
            by loop, then line, then position.
        segments: numpy int32 ``(segments, 6)``: first row, rows, loop, line, state slot read (-1:
            zeros), state slot written. A segment is consecutive positions of one sequence.
        fresh: how many rows are of loop 0, and so begin with an embedding: the first ones.
        wanted: ``(n_wanted,)`` int32, the rows whose logits are asked for, in any order.
        wanted_loops: ``(n_wanted,)`` int32, their loops.
        block_table: ``(lines, blocks)`` int32.
        before_logits: called by the runner when the layers have run and before it reads ``wanted``,
            which may have become fewer rows then; None where nobody asks.
        line_requests: numpy int64 ``(lines,)``, the request that has each line.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    loops: torch.Tensor
    arena: torch.Tensor
    lines: torch.Tensor
    kv_slots: torch.Tensor
    segments: np.ndarray[Any, Any]
    wanted: torch.Tensor
    wanted_loops: torch.Tensor
    block_table: torch.Tensor
    line_requests: np.ndarray[Any, Any]
    rows: int
    fresh: int
    n_wanted: int
    before_logits: Callable[[], None] | None = None

    def __init__(self, source: Any) -> None:
        self._whole = [torch.from_numpy(getattr(source, name)) for name in ROW_FIELDS]
        self._whole_wanted = [torch.from_numpy(getattr(source, name)) for name in WANTED_FIELDS]
        self._segments = source.segments
        self.block_table = torch.from_numpy(source.block_table)
        self.line_requests = source.request_ids
        # A slice costs a microsecond, and there are few sizes.
        self._views: dict[int, list[torch.Tensor]] = {}
        self._wanted_views: dict[tuple[int, int], list[torch.Tensor]] = {}

    def resize(self, rows: int, segments: int, wanted: int, fresh: int) -> None:
        """Show the first ``rows`` rows, ``fresh`` of them in loop 0, ``segments`` segments and
        ``wanted`` wanted rows."""
        views = self._views.get(rows)
        if views is None:
            views = self._views[rows] = [whole[:rows] for whole in self._whole]
        self.tokens, self.positions, self.loops, self.arena, self.lines, self.kv_slots = views
        self.rows, self.fresh = rows, fresh
        self.segments = self._segments[:segments]
        self.want(0, wanted)

    def want(self, start: int, stop: int) -> None:
        """Ask for the logits of the scheduler's wanted rows ``start`` up to ``stop`` alone."""
        views = self._wanted_views.get((start, stop))
        if views is None:
            whole = self._whole_wanted
            views = self._wanted_views[start, stop] = [part[start:stop] for part in whole]
        self.wanted, self.wanted_loops = views
        self.n_wanted = stop - start

    def want_some(self, which: np.ndarray[Any, Any]) -> None:
        """Ask for the logits of the scheduler's wanted rows ``which`` (n,) alone."""
        whole = self._whole_wanted
        self.wanted, self.wanted_loops = (torch.from_numpy(part.numpy()[which]) for part in whole)
        self.n_wanted = len(which)

    def only(self, line: int) -> tuple[Batch, np.ndarray[Any, Any]]:
        """The rows of one sequence as a batch of their own, and which of the wanted rows it has."""
        rows = np.flatnonzero(self.lines.numpy() == line)
        segments = self.segments[self.segments[:, LINE] == line]  # a copy
        segments[:, FIRST] = np.searchsorted(rows, segments[:, FIRST])
        wanted = self.wanted.numpy()
        places = np.flatnonzero(np.isin(wanted, rows))
        source = SimpleNamespace(
            **{name: getattr(self, name).numpy()[rows] for name in ROW_FIELDS},
            segments=segments,
            wanted=np.searchsorted(rows, wanted[places]).astype(np.int32),
            wanted_loops=self.wanted_loops.numpy()[places],
            block_table=self.block_table.numpy(),
            request_ids=self.line_requests,
        )
        batch = Batch(source)
        batch.resize(len(rows), len(segments), len(places), int(np.sum(rows < self.fresh)))
        return batch, places

    @classmethod
    def of_spans(
        cls,
        spans: Iterable[Span],
        block_table: np.ndarray[Any, Any],
        block_size: int,
        *,
        wanted: Sequence[int],
    ) -> Batch:
        """A batch without a scheduler, for measuring and for tests.

        Args:
            spans: in the order of rows.
            block_table: ``(lines, blocks)`` int32.
            block_size: positions in a block.
            wanted: rows whose logits are asked for.
        """
        columns: list[list[int]] = [[] for _ in ROW_FIELDS]
        segments = []
        for span in spans:
            first = len(columns[0])
            segments.append(
                (first, len(span.tokens), span.loop, span.line, span.state_in, span.state_out)
            )
            arena = first if span.arena is None else span.arena
            for offset, token in enumerate(span.tokens):
                position = span.start + offset
                slot = -1
                if span.writes and block_table.size:
                    block = int(block_table[span.line, position // block_size])
                    slot = block * block_size + position % block_size
                row = (token, position, span.loop, arena + offset, span.line, slot)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        arrays = {n: np.array(c, np.int32) for n, c in zip(ROW_FIELDS, columns, strict=True)}
        chosen = np.array(wanted, np.int32)
        source = SimpleNamespace(
            **arrays,
            segments=np.array(segments, np.int32).reshape(-1, 6),
            wanted=chosen,
            wanted_loops=arrays["loops"][chosen],
            block_table=block_table,
            request_ids=np.arange(len(block_table)),
        )
        batch = cls(source)
        fresh = int(np.sum(arrays["loops"] == 0))
        batch.resize(len(columns[0]), len(segments), len(chosen), fresh)
        return batch
