"""A request that makes a launch, the exit policy or the tokenizer raise fails alone."""

from __future__ import annotations

import pytest

from effinfer import SamplingParams
from effinfer.engine import policies
from effinfer.engine.engine import EngineClosed
from tests.engine.test_engine_models import MODELS, alone, engine_of, recursive
from tests.engine.toy import Letters, make, prompt_of, serial

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = 7
PARAMS = SamplingParams(max_tokens=8)
MODES = {
    "full": (3, {}),
    "exit": (3, {"mode": "exit", "policy": policies.margin(0.2)}),
    "lossless": (3, {"mode": "lossless", "policy": policies.margin(0.2)}),
    "drafts": (1, {"max_ngram": 3}),
}


def good(seed, length):
    """A prompt whose output does not contain the bad token either."""
    while True:
        prompt = prompt_of(seed, length)
        if BAD not in prompt + serial(prompt, PARAMS)[0] + serial(prompt, PARAMS, loops=3)[0]:
            return prompt
        seed += 100


def want(engine, prompt, loops):
    threshold = 0.2 if engine.mode == "exit" else None
    return serial(prompt, PARAMS, loops=loops, policy=threshold)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_launch_that_raises_ends_whom_it_is_for(mode):
    loops, options = MODES[mode]
    prompts = [good(i, 4 + 3 * i) for i in range(6)]
    prompts[1] = [*prompts[1][:2], BAD, *prompts[1][2:]]
    prompts[4] = [*prompts[4], BAD]  # in a later chunk
    with make(loops, **options) as engine:
        engine.runner.raises_on = BAD
        outputs = engine.generate(prompts, PARAMS)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            if i in (1, 4):
                assert output.finish_reason == "error"
                assert output.error == f"the model raised ArithmeticError: token {BAD}"
            elif mode != "exit" or BAD not in want(engine, prompt, loops):
                assert output.finish_reason == "length"
                assert output.tokens == want(engine, prompt, loops)
        again = engine.generate([prompts[0]], PARAMS)[0]  # it goes on
        assert again.tokens == outputs[0].tokens
        engine._scheduler.check()
        assert engine.stats()["running"] == 0


def test_one_bad_request_alone_is_its_own_fault_and_many_in_a_row_the_engines():
    with make() as engine:
        engine.runner.raises_on = BAD
        for _ in range(2):
            assert engine.generate([[BAD]], PARAMS)[0].finish_reason == "error"
        assert engine.generate([good(0, 4)], PARAMS)[0].finish_reason == "length"
        for _ in range(2):
            assert engine.generate([[BAD]], PARAMS)[0].finish_reason == "error"
        with pytest.raises(ArithmeticError):
            engine.generate([[BAD]], PARAMS)
        with pytest.raises(EngineClosed, match="broke down: ArithmeticError"):
            engine.submit([1])


class Picky(policies.Margin):
    """Raises when it sees some request."""

    def __init__(self, *bad):
        super().__init__(0.2)
        self.bad = bad

    def decide(self, rows):
        if set(self.bad) & set(rows.requests.tolist()):
            raise LookupError("not this one")
        return super().decide(rows)


def test_a_policy_that_raises_ends_whom_it_is_for():
    prompts = [prompt_of(i, 5) for i in range(4)]
    with make(3, mode="exit", policy=policies.margin(0.2)) as engine:
        wanted = engine.generate(prompts, PARAMS)
    with make(3, mode="exit", policy=Picky(2)) as engine:
        outputs = engine.generate(prompts, PARAMS)
    assert outputs[2].error == "the exit policy raised LookupError: not this one"
    for i in (0, 1, 3):
        assert (outputs[i].tokens, outputs[i].depths) == (wanted[i].tokens, wanted[i].depths)


class Hasty(policies.Replay):
    """Needs no logits: is asked in the middle of a launch. Raises when it sees some request."""

    def decide(self, rows):
        if 1 in rows.requests:
            raise LookupError("not this one")
        return super().decide(rows)


def test_a_policy_that_raises_before_the_logits_ends_whom_it_is_for():
    prompts = [prompt_of(i, 5) for i in range(3)]
    outputs = []
    for policy in (policies.replay([2, 1, 3]), Hasty([2, 1, 3])):
        with engine_of(recursive(3), mode="exit", policy=policy) as engine:
            outputs.append(engine.generate(prompts, PARAMS))
    assert outputs[1][1].error == "the exit policy raised LookupError: not this one"
    for i in (0, 2):
        assert outputs[1][i].tokens == outputs[0][i].tokens
        assert outputs[1][i].depths == outputs[0][i].depths


class Stuttering(Letters):
    """Cannot decode one token."""

    def __init__(self, bad):
        self.bad = bad

    def decode(self, ids, **options):
        if self.bad in ids:
            raise UnicodeError("no such letter")
        return super().decode(ids, **options)


def test_a_tokenizer_that_raises_ends_whom_it_is_for():
    prompts = [prompt_of(i, 5) for i in range(3)]
    tokens = [serial(prompt, PARAMS)[0] for prompt in prompts]
    bad = next(t for t in tokens[1] if t not in tokens[0] + tokens[2])
    params = SamplingParams(max_tokens=8, stop="nothing like it")
    with make(tokenizer=Stuttering(bad)) as engine:
        handles = [engine.submit(prompt, params) for prompt in prompts]
        engine.drain()
    assert [handle.finish_reason for handle in handles] == ["length", "error", "length"]
    assert handles[1].error == "decoding failed: UnicodeError: no such letter"
    assert [handles[i].tokens for i in (0, 2)] == [tokens[0], tokens[2]]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "gemma2"])
def test_a_module_that_raises_for_one_sequence_leaves_the_others_states_exact(name):
    """In the last layer, when those before have moved on the states of all."""
    model, seen = MODELS[name](), []
    prompts = [list(range(1, 30)), [5, 3], [9] * 21]
    wanted = [alone(model, prompt) for prompt in prompts]
    bad = next(t for t in range(30, 97) if not any(t in tokens for tokens in wanted))

    def look(module, arguments):
        seen[:] = arguments[0].flatten().tolist()

    def burst(module, arguments, output):
        if bad in seen:
            raise ArithmeticError(f"token {bad}")

    backbone = getattr(model, "model", None) or model.backbone
    model.get_input_embeddings().register_forward_pre_hook(look)
    backbone.layers[-1].register_forward_hook(burst)
    with engine_of(model) as engine:
        handles = [engine.submit(prompt, SamplingParams(max_tokens=10)) for prompt in prompts]
        for _ in range(4):
            engine.step()
        failing = engine.submit([*range(2, 16), bad, 4], SamplingParams(max_tokens=3))
        engine.drain()
        assert failing.finish_reason == "error"
        assert failing.error == f"the model raised ArithmeticError: token {bad}"
        assert engine.stats()["running"] == 0
    assert [handle.tokens for handle in handles] == wanted
