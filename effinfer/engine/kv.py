"""The memory that sequences live in: paged keys and values, and slots of recurrent states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import numpy as np
import torch

from effinfer._native import native


class KVPages:
    """Keys and values of all layers and planes, in blocks of positions (PagedAttention, arXiv
    2309.06180), in one allocation.

    In memory keys are (planes, blocks, heads, dim, block_size): attention reads them with positions
    as lanes, and writing a column once is less than transposing it at every read. Values are
    (planes, blocks, heads, block_size, dim). So what a head reads of a block is one piece of each.

    Args:
        heads: for each attention layer its key-value heads and their dimension.
        planes: how many keys and values each position has per layer: one per loop of a recursive
            model that keeps them apart, else 1.
        blocks, block_size: how many blocks there are, of how many positions (a multiple of 16 for
            ``paged_attention``).
        dtype: of keys and values.

    Attributes:
        keys, values: for each attention layer a view (planes, blocks, block_size, heads, dim), as
            ``paged_attention`` and ``rope_write`` take them.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        *,
        planes: int,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        slots = planes * blocks * block_size
        sizes = [slots * count * dim for count, dim in heads for _ in "kv"]
        self.memory = torch.empty(sum(sizes), dtype=dtype)
        parts = torch.split(self.memory, sizes)
        lead = (planes, blocks)
        self.keys = [
            part.view(*lead, count, dim, block_size).permute(0, 1, 4, 2, 3)
            for part, (count, dim) in zip(parts[::2], heads, strict=True)
        ]
        self.values = [
            part.view(*lead, count, block_size, dim).transpose(2, 3)
            for part, (count, dim) in zip(parts[1::2], heads, strict=True)
        ]

    @staticmethod
    def bytes_per_block(
        heads: Sequence[tuple[int, int]], planes: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """What a block takes in all layers and planes."""
        return 2 * planes * block_size * sum(count * dim for count, dim in heads) * dtype.itemsize

    def poison(self) -> None:
        """Fill all with NaN: a test then sees whatever is read before it was written."""
        self.memory.fill_(torch.nan)


class StatePool:
    """Slots of recurrent states; a slot holds the states of all layers, side by side, in float32.

    Args:
        shapes: of every state in a slot.
        slots: how many there are.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], slots: int) -> None:
        sizes = [prod(shape) for shape in shapes]
        # Sizes in whole cache lines, so that no two states share one.
        starts = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
        self.memory = torch.empty(slots, starts[-1])
        #: For each shape, ``(slots, *shape)``: the state in every slot.
        self.states = [
            self.memory[:, start : start + size].view(slots, *shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=False)
        ]
        self._zeros = torch.zeros(1, starts[-1])

    @staticmethod
    def bytes_per_slot(shapes: Sequence[tuple[int, ...]]) -> int:
        """What a slot takes."""
        return sum(-(-prod(shape) // 16) * 64 for shape in shapes)

    def copy(self, pairs: np.ndarray[tuple[int, int], np.dtype[np.int32]]) -> None:
        """Copy slots: int32 ``(n, 2)``, from and to; none is both read and written."""
        if len(pairs):
            source, target = (torch.from_numpy(np.ascontiguousarray(c)) for c in pairs.T)
            native(self.memory).state_copy(self.memory, target, self.memory, source)

    def clear(self, slots: torch.Tensor) -> None:
        """Set the states in ``slots`` (n,) int32 to zero."""
        if len(slots):
            first = torch.zeros_like(slots)
            native(self.memory).state_copy(self.memory, slots, self._zeros, first)

    def poison(self) -> None:
        """Fill all with NaN."""
        self.memory.fill_(torch.nan)
