"""One budget in bytes, divided into KV blocks and recurrent state slots."""

from __future__ import annotations

import os
from dataclasses import dataclass

from effinfer.engine.runner import RunnerSpec

FRACTION = 4  # of the free memory, one such part by default


@dataclass(frozen=True)
class Pools:
    """How many KV blocks and state slots there are."""

    blocks: int
    states: int


def free_memory() -> int:
    """Bytes this machine can give without swapping, as far as it tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def divide(
    spec: RunnerSpec,
    memory_bytes: int | None,
    *,
    max_slots: int,
    max_positions: int,
    states_per_request: int,
    prefix_cache: bool,
) -> Pools:
    """Divide the budget: states that requests run in, then blocks, and states for reused prefixes.

    Args:
        memory_bytes: None for a quarter of the free memory. What ``max_slots`` sequences of
            ``max_positions`` can't use is not taken.
        states_per_request: slots that a running sequence takes.

    Raises:
        ValueError: the budget is too small for ``max_slots`` sequences' states, or one block.
    """
    budget = free_memory() // FRACTION if memory_bytes is None else memory_bytes
    states = max_slots * states_per_request if spec.has_state else 0
    least = states * spec.bytes_per_state + (spec.bytes_per_block if spec.has_kv else 0)
    if budget < least:
        raise ValueError(
            f"Engine: memory_bytes must be at least {least} for max_slots = {max_slots}, "
            f"got {budget}"
        )
    left = budget - states * spec.bytes_per_state
    snapshots = 0
    if spec.has_state and prefix_cache:
        share = left // 2 if spec.has_kv else left
        snapshots = min(2 * max_slots, share // max(1, spec.bytes_per_state))
        left -= snapshots * spec.bytes_per_state
    blocks = 0
    if spec.has_kv:
        useful = max_slots * -(-max_positions // spec.block_size)
        blocks = min(useful, left // max(1, spec.bytes_per_block))
    return Pools(blocks, states + snapshots)
