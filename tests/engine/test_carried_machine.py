"""Random operations on the carried recursive models: whatever company a request has, it ends once, and
with the tokens it has alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from effinfer import Engine, SamplingParams
from effinfer.engine import policies
from effinfer.engine.runner import make_runner
from effinfer.engine.wrappers import WrappedRunner
from effinfer.loading import load_model
from effinfer.models import recursive_demo_path

pytestmark = pytest.mark.usefixtures("one_thread")
POISON = 1023  # a token of the vocabulary
ROWS = 24
WHOLE = {"length", "error"}  # ends that a request comes to by itself


class Poisoned(WrappedRunner):
    """NaN for the logits of rows that hold POISON."""

    def launch(self, batch):
        logits = super().launch(batch)
        if logits is not None:
            logits[batch.tokens[batch.wanted] == POISON] = torch.nan
        return logits


@functools.cache
def model(loops):
    return load_model(recursive_demo_path(loops))[0]


def engine_of(loops, mode, slots):
    return Engine(
        Poisoned(make_runner(model(loops))),
        mode=mode,
        policy=None if mode == "full" else policies.margin(0.1),
        max_slots=slots,
        token_budget=ROWS,
        prefill_chunk=7,
        max_positions=64,
        costs=[1.0 + 0.01 * rows for rows in range(ROWS)],
    )


@functools.cache
def alone(loops, mode, prompt, params):
    """Tokens and end of a request that nobody shares launches with; of full depth for ``lossless``."""
    with engine_of(loops, "full" if mode == "lossless" else mode, 1) as engine:
        output = engine.submit(list(prompt), params).result()
    return output.tokens, output.finish_reason


def prompt_of(seed, length, poisoned):
    """Of a few, so that some share their beginnings."""
    tokens = np.random.default_rng(seed).integers(2, 1000, length).tolist()
    return (*tokens, POISON) if poisoned else tuple(tokens)


class Machine(RuleBasedStateMachine):
    @initialize(loops=st.sampled_from([2, 4]), mode=st.sampled_from(["full", "exit", "lossless"]))
    def begin(self, loops, mode):
        self.case = loops, mode
        self.engine = engine_of(loops, mode, 4)
        self.sent = []

    @rule(
        seed=st.integers(0, 2),
        length=st.integers(1, 20),
        poisoned=st.integers(0, 9).map(lambda n: n == 0),
        tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 0.0, 0.9]),
        deadline=st.sampled_from([None] * 8 + [0.0]),
    )
    def submit(self, seed, length, poisoned, tokens, temperature, deadline):
        prompt = prompt_of(seed, length, poisoned)
        params = SamplingParams(
            max_tokens=tokens, temperature=temperature, seed=seed, ignore_eos=True
        )
        handle = self.engine.submit(list(prompt), params, deadline=deadline)
        self.sent.append((handle, prompt, params))

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @rule(which=st.integers(0, 30))
    def disconnect(self, which):
        if self.sent:
            self.sent[which % len(self.sent)][0].cancel()

    @invariant()
    def bookkeeping_is_sound(self):
        if hasattr(self, "engine"):
            self.engine._scheduler.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        stats = self.engine.stats()
        assert stats["running"] == stats["waiting"] == 0
        assert sum(stats["finished"].values()) == len(self.sent)
        for handle, prompt, params in self.sent:
            tokens, reason = alone(*self.case, prompt, params)
            if handle.finish_reason in WHOLE:
                assert (handle.tokens, handle.finish_reason) == (tokens, reason)
            else:
                assert handle.finish_reason in {"cancelled", "deadline"}
                assert handle.tokens == tokens[: len(handle.tokens)]
        self.engine.close()


TestCarried = Machine.TestCase
TestCarried.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
