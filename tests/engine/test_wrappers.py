"""Runners around runners: lockstep gives the same tokens at one depth a launch; traces are true."""

from __future__ import annotations

from collections import Counter

import pytest

from effinfer.engine.engine import Engine
from effinfer.engine.params import SamplingParams
from effinfer.engine.policies import replay
from effinfer.engine.runner import make_runner
from effinfer.engine.wrappers import LockstepRunner, TracedRow, TracedRunner
from tests.recursive.models import tiny_model

LOOPS = 3
REQUESTS = (([5, 6, 7], 4), ([8], 6), ([9, 10, 11, 12, 13], 2))


def run(runner, **options) -> list[list[int]]:
    """Tokens of each request."""
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in REQUESTS]
    with Engine(runner, max_slots=2, prefix_cache=False, **options) as engine:
        outputs = engine.generate([prompt for prompt, _ in REQUESTS], params)
    return [output.tokens for output in outputs]


@pytest.mark.parametrize("kv_policy", ["depth", "first"])
def test_lockstep_gives_full_depths_tokens_at_one_depth_a_launch(kv_policy):
    model = tiny_model(kv_policy=kv_policy)
    traced = TracedRunner(make_runner(model))
    assert run(LockstepRunner(traced)) == run(model)
    depths = [{row.loop for row in launch} for launch in traced.launches]
    assert depths == [{loop} for loop in range(LOOPS)] * (len(depths) // LOOPS)


def test_lockstep_runs_every_position_through_every_loop():
    traced = TracedRunner(make_runner(tiny_model()))
    run(LockstepRunner(traced), prefill_chunk=2)
    rows = Counter(
        (row.request, row.position, row.loop) for launch in traced.launches for row in launch
    )
    assert rows == {
        (request, position, loop): 1
        for request, (prompt, count) in enumerate(REQUESTS)
        for position in range(len(prompt) + count - 1)  # the last token is never fed
        for loop in range(LOOPS)
    }


def test_lockstep_refuses_states():
    class Stateful:
        spec = type("Spec", (), {"has_state": True})

    with pytest.raises(ValueError, match="no recurrent states"):
        LockstepRunner(Stateful())


def test_trace_of_an_exit():
    """The token of position 1 exits after one loop: the next begins as its other loops run."""
    traced = TracedRunner(make_runner(tiny_model()))
    with Engine(traced, max_slots=1, mode="exit", policy=replay([3, 1, 3])) as engine:
        engine.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert traced.launches[:6] == [
        [TracedRow(slot=0, request=0, position=0, loop=0)],
        [TracedRow(slot=0, request=0, position=0, loop=1)],
        [TracedRow(slot=0, request=0, position=0, loop=2)],
        [TracedRow(slot=0, request=0, position=1, loop=0)],
        [TracedRow(0, 0, position=2, loop=0), TracedRow(0, 0, position=1, loop=1)],
        [TracedRow(0, 0, position=2, loop=1), TracedRow(0, 0, position=1, loop=2)],
    ]
