"""Directed cases of the scheduler: what exactly is in each launch, and what is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from effinfer import _native
from effinfer.engine.trace import write_launch


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


def test_cancelled_while_its_rows_run() -> None:
    """Its tokens are dropped, its event comes with the commit, the others go on."""
    s = make()
    s.submit(1, prompt(1, 2), 4)
    s.submit(2, prompt(3, 4), 4)
    s.plan(0.0)
    assert s.cancel(1)
    assert not s.cancel(1)
    s.commit(np.full(s.n_wanted, 5, np.int32), None, 0.0)
    assert events(s) == [[2, 5, 1, 0], [1, -1, 0, 3]]
    s.check()


def test_a_deadline_passes_in_the_queue_and_while_running() -> None:
    s = make(max_slots=1)
    s.submit(1, prompt(1, 2), 20, deadline=5.0)
    s.submit(2, prompt(3, 4), 4, deadline=2.0)
    s.plan(0.0)
    s.commit(np.full(s.n_wanted, 9, np.int32), None, 0.0)
    s.plan(3.0)
    assert events(s) == [[2, -1, 0, 4]]
    s.commit(np.full(s.n_wanted, 9, np.int32), None, 6.0)
    assert events(s) == [[1, 9, 1, 0], [1, -1, 0, 4]]


def test_a_poisoned_request_fails_alone() -> None:
    s = make(prefill_chunk=8)
    for request in (1, 2, 3):
        s.submit(request, prompt(request, 2), 2)
    s.plan(0.0)
    s.fail(2)
    s.commit(np.full(s.n_wanted, 9, np.int32), None, 0.0)
    assert events(s) == [[1, 9, 1, 0], [3, 9, 1, 0], [2, -1, 0, 5]]
    s.plan(0.0)
    s.commit(np.full(s.n_wanted, 9, np.int32), None, 0.0)
    assert events(s)[-2:] == [[1, -1, 0, 1], [3, -1, 0, 1]]


def test_the_whole_context_may_be_used() -> None:
    s = make(prefill_chunk=8, num_blocks=8)
    s.submit(1, prompt(*range(31)), 1)
    assert sum(len(rows) for rows in launches(s)) == 31


def test_a_stop_token_comes_with_its_ending() -> None:
    s = make()
    s.submit(1, prompt(1, 2), 9, [9])
    s.plan(0.0)
    s.commit(prompt(9), None, 0.0)
    assert events(s) == [[1, 9, 1, 2]]


def test_a_prefix_is_computed_once() -> None:
    s = make()
    for request in (1, 2):
        s.submit(request, prompt(*range(10)), 1)
        rows = [position for launch in launches(s) for position, _ in launch]
        assert rows == list(range(0 if request == 1 else 8, 10))
    assert s.stats()["prefix_hit_tokens"] == 8


def test_a_recurrent_prefix_continues_from_a_snapshot() -> None:
    """The second prompt reads the slot that the first one's chunk ended in, and does not write it."""
    s = make(has_kv=False, num_states=6, num_blocks=0)
    s.submit(1, prompt(*range(10)), 1)
    launches(s)
    s.submit(2, prompt(*range(10), 99), 1)
    rows = s.plan(0.0)
    assert s.positions[:rows].tolist() == [8, 9, 10]
    (_, _, _, _, state_in, state_out), *_ = s.segments[: s.n_segments].tolist()
    assert state_in >= 0
    assert state_out not in (-1, state_in)


def test_an_exit_leaves_its_other_loops_to_later_launches() -> None:
    s = make(loops=3, mode="exit")
    s.submit(1, prompt(5), 3)
    assert launches(s, exits=1) == [[(0, 0)], [(1, 0), (0, 1)], [(2, 0), (1, 1), (0, 2)]]
    assert s.stats()["fill_rows"] == 3


@pytest.mark.parametrize("policy", ["first", "shared", "propagate"])
def test_an_exit_leaves_nothing_where_deeper_planes_are_not_read(policy: str) -> None:
    s = make(loops=3, mode="exit", kv_policy=policy)
    s.submit(1, prompt(5), 3)
    prefill = [[(0, 0)]] if policy == "first" else [[(0, 0)], [(0, 1)], [(0, 2)]]
    assert launches(s, exits=1) == [*prefill, [(1, 0)], [(2, 0)]]


def test_drafts_are_verified_in_the_launches_of_the_next_tokens() -> None:
    s = make(loops=3, mode="lossless", costs=[1.0] * 8)
    s.submit(1, prompt(5), 4)
    assert launches(s, exits=1) == [
        [(0, 0)],  # asks for no early logits: nothing decodes yet that drafts could help
        [(0, 1)],
        [(1, 0), (0, 2)],
        [(2, 0), (1, 1)],
        [(3, 0), (2, 1), (1, 2)],
        [(3, 1), (2, 2)],
        [(3, 2)],
    ]


def test_a_wrong_draft_is_flushed() -> None:
    s = make(loops=2, mode="lossless", costs=[1.0] * 8)
    s.submit(1, prompt(5), 3)
    seen = []
    for token in (0, 7, 8, 9, 0, 6):  # after 7, loop 0 says 8, and loop 1 says 9
        rows = s.plan(0.0)
        seen.append(list(zip(s.tokens[:rows].tolist(), s.loops[:rows].tolist(), strict=True)))
        s.commit(np.full(s.n_wanted, token, np.int32), np.ones(s.n_wanted, np.uint8), 0.0)
        s.check()
    assert seen == [[(5, 0)], [(5, 1)], [(7, 0)], [(8, 0), (7, 1)], [(9, 0)], [(9, 1)]]
    assert s.stats()["drafts_flushed"] == 1


def test_a_decoding_request_never_waits_for_ever_behind_others() -> None:
    s = make(max_rows=1, prefill_chunk=1)
    for request in range(4):
        s.submit(request, prompt(1, 2, 3, 4), 20)
    last = [0] * 4
    for launch in range(1, 80):
        assert s.plan(0.0) == 1
        request = int(s.request_ids[s.lines[0]])
        assert launch - last[request] <= 8 + 4 + 1
        last[request] = launch
        s.commit(np.full(s.n_wanted, 9, np.int32), None, 0.0)


def test_plan_and_commit_alternate() -> None:
    s = make()
    with pytest.raises(RuntimeError, match="commit: there is no plan to commit"):
        s.commit(prompt(), None, 0.0)
    s.submit(1, prompt(1), 1)
    s.plan(0.0)
    with pytest.raises(RuntimeError, match="plan: the last plan has not been committed"):
        s.plan(0.0)
    with pytest.raises(ValueError, match=r"commit: tokens must have length 1, got \(2,\)"):
        s.commit(prompt(1, 2), None, 0.0)
    with pytest.raises(ValueError, match="commit: tokens must be a contiguous array of int32"):
        s.commit(np.zeros(1), None, 0.0)


def test_a_trace_has_a_line_per_launch() -> None:
    s = make(loops=2)
    s.submit(7, prompt(3), 1)
    file = io.StringIO()
    while s.plan(0.0):
        write_launch(file, s, 0.5)
        s.commit(np.full(s.n_wanted, 9, np.int32), None, 0.0)
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [
        {"time": 0.5, "rows": [[7, 0, 0]], "wanted": []},
        {"time": 0.5, "rows": [[7, 0, 1]], "wanted": [[7, 0, 1, False]]},
    ]
