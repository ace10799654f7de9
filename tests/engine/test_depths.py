"""Requests that bound their own depth, among others that don't."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from effinfer.engine import policies
from effinfer.engine.params import SamplingParams
from tests.engine.toy import ToyRunner, make, prompt_of, serial

DEPTHS = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.just("full"),
        "min_loops": st.integers(1, 3),
        "max_loops": st.integers(1, 3),
        "exit_threshold": st.sampled_from([-1.0, 0.05, 0.4, 2.0]),
    },
).filter(lambda d: d.get("min_loops", 1) <= d.get("max_loops", 3))


def depth_params(depth, mode, **rest):
    """Of a drawn ``depth``, what goes together and the engine's mode can do."""
    if depth.get("mode") == "full":
        depth = {key: depth[key] for key in ("mode", "min_loops") if key in depth}
    if mode == "lossless":
        depth = {key: value for key, value in depth.items() if key != "max_loops"}
    return SamplingParams(**rest, **depth)


@given(
    depths=st.lists(DEPTHS, min_size=2, max_size=9),
    mode=st.sampled_from(["exit", "lossless"]),
    kv_policy=st.sampled_from(["depth", "first"]),
    drawn=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_each_request_has_its_own_depths(depths, mode, kv_policy, drawn):
    with make(
        mode=mode, policy=policies.margin(0.2), runner=ToyRunner(3, kv_policy=kv_policy)
    ) as engine:
        prompts = [prompt_of(i % 3, 1 + 3 * i % 11) for i in range(len(depths))]
        params = [
            depth_params(depth, mode, max_tokens=8, temperature=0.8 * drawn, seed=i)
            for i, depth in enumerate(depths)
        ]
        outputs = engine.generate(prompts, params)
        for prompt, one, output in zip(prompts, params, outputs, strict=True):
            own = 0.2 if mode == "exit" else None
            want, took = serial(prompt, one, loops=3, policy=own)
            assert output.tokens == want
            assert output.depths == took
        if mode == "lossless":
            drafted = engine.stats()["drafts_accepted"] + engine.stats()["drafts_flushed"]
            if all(one.mode == "full" for one in params):
                assert drafted == 0


@pytest.mark.parametrize(
    ("mode", "loops", "depth", "message"),
    [
        ("full", 1, {"mode": "exit"}, "mode 'exit' is not what a model of one loop can do"),
        ("full", 1, {"min_loops": 2}, "min_loops must be at most the model's 1, got 2"),
        ("full", 1, {"max_loops": 2}, "max_loops must be 1 without exits, got 2"),
        ("full", 1, {"exit_threshold": 0.5}, "exit_threshold needs an engine whose exit policy"),
        ("full", 3, {"mode": "lossless"}, "mode 'lossless' is not what an engine of mode 'full'"),
        ("full", 3, {"max_loops": 2}, "max_loops must be 3 without exits, got 2"),
        ("lossless", 3, {"max_loops": 2}, "max_loops must be 3 without exits, got 2"),
        ("exit", 3, {"mode": "lossless"}, "mode 'lossless' is not what an engine of mode 'exit'"),
        ("exit", 3, {"mode": "full", "max_loops": 2}, "max_loops must be 3 without exits, got 2"),
        ("exit", 3, {"max_loops": 4}, r"max_loops must be in \[1, 3\], got 4"),
        ("exit", 3, {"min_loops": 4}, "min_loops must be at most the model's 3, got 4"),
    ],
)
def test_depths_that_the_engine_cannot_do_are_refused(mode, loops, depth, message):
    policy = None if mode == "full" else policies.margin(0.2)
    with make(loops, mode=mode, policy=policy) as engine:
        with pytest.raises(ValueError, match=f"submit: {message}"):
            engine.submit([1], SamplingParams(**depth))
        assert engine.stats()["requests"] == 0


def test_a_policy_without_a_threshold_takes_none():
    class Every:
        needs_logits = True

        def decide(self, rows):
            return np.ones(len(rows.loops), dtype=np.uint8)

    with make(3, mode="exit", policy=Every()) as engine:
        with pytest.raises(ValueError, match="exit_threshold needs an engine whose exit policy"):
            engine.submit([1], SamplingParams(exit_threshold=0.5))
        bounds = [SamplingParams(max_tokens=4, min_loops=n) for n in (1, 2, 3)]
        outputs = engine.generate([[1, 2]] * 3, bounds)
    assert [output.depths for output in outputs] == [[1] * 4, [2] * 4, [3] * 4]
