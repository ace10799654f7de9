"""Directed cases of the scheduler: what exactly is in each launch, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from effinfer import _native


def make(**config: Any) -> Any:
    """A small scheduler; ``config`` overrides its sizes."""
    sizes = {
        "max_slots": 4,
        "max_rows": 8,
        "prefill_chunk": 4,
        "block_size": 4,
        "num_blocks": 32,
        "max_positions": 32,
    }
    return _native.module("_C").Scheduler(**{**sizes, **config})


def prompt(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def events(s: Any) -> list[list[int]]:
    """[request id, token, depth, kind] of the last call's events."""
    return s.events[: s.n_events].tolist()


def launches(s: Any, token: int = 9, exits: int = 0) -> list[list[tuple[int, int]]]:
    """(position, loop) of every row of every launch until nothing is left to do."""
    seen = []
    while n := s.plan(0.0):
        seen.append(list(zip(s.positions[:n].tolist(), s.loops[:n].tolist(), strict=True)))
        s.commit(np.full(s.n_wanted, token, np.int32), np.full(s.n_wanted, exits, np.uint8), 0.0)
        s.check()
    return seen


def test_chunks_of_a_prompt_are_pipelined_through_the_loops() -> None:
    s = make(loops=2)
    s.submit(7, prompt(0, 1, 2, 3, 4, 5), 3)
    chunk = [0, 1, 2, 3]
    assert launches(s) == [
        [(p, 0) for p in chunk],
        [(4, 0), (5, 0)] + [(p, 1) for p in chunk],
        [(4, 1), (5, 1)],
        *([(6, 0)], [(6, 1)]),
        *([(7, 0)], [(7, 1)]),
    ]
    assert s.stats()["depths"] == [0, 3]


def test_a_finished_request_gives_everything_back() -> None:
    s = make(prefix_cache=False)
    s.submit(7, prompt(0, 1, 2, 3, 4, 5), 3)
    launches(s)
    stats = s.stats()
    assert (stats["free_blocks"], stats["running"], stats["waiting"]) == (32, 0, 0)
    assert (s.block_table == -1).all()


def test_events_of_a_request_end_with_exactly_one_terminal_event() -> None:
    s = make()
    s.submit(7, prompt(1, 2), 2)
    seen = []
    while s.plan(0.0):
        s.commit(np.full(s.n_wanted, 5, np.int32), None, 0.0)
        seen += events(s)
    assert seen == [[7, 5, 1, 0], [7, 5, 1, 0], [7, -1, 0, 1]]


@pytest.mark.parametrize(
    ("tokens", "max_new_tokens", "text"),
    [
        ([], 1, "submit: prompt must have at least one token, got none"),
        ([1], 0, "submit: max_new_tokens must be at least 1, got 0"),
        ([1], -5, "submit: max_new_tokens must be at least 1, got -5"),
        ([1] * 30, 3, "must fit max_positions = 32 together, got 30 and 3"),
        ([1], 2**40, "must fit max_positions = 32 together"),
    ],
)
def test_what_can_never_run_is_refused(tokens: list[int], max_new_tokens: int, text: str) -> None:
    s = make()
    with pytest.raises(ValueError, match=text):
        s.submit(1, prompt(*tokens), max_new_tokens)
    assert (s.waiting, s.plan(0.0)) == (0, 0)


def test_more_blocks_than_there_are_is_refused() -> None:
    s = make(num_blocks=2)
    s.submit(1, prompt(1, 2, 3, 4, 5, 6), 3)
    with pytest.raises(ValueError, match="must fit all 2 blocks of 4, got 6 and 4"):
        s.submit(2, prompt(1, 2, 3, 4, 5, 6), 4)
