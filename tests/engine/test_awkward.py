"""The engine in the hands of somebody in a hurry: interrupts, forgotten engines, one model in two
engines, prompts of the wrong kind."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import effinfer
from effinfer import SamplingParams, UnsupportedModelError
from tests.engine.runners import tiny
from tests.engine.test_engine_models import alone, engine_of, prompts
from tests.patch.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingParams(max_tokens=6)
GEMMA = {"head_dim": 16, "sliding_window": 6}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


class Interrupts:
    """A method that raises KeyboardInterrupt at one of its calls, before or after what it does."""

    def __init__(self, owner, name, call, before):
        self.calls, self.call, self.before = 0, call, before
        self.owner, self.name, self.method = owner, name, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **options):
        self.calls += 1
        if self.before and self.calls == self.call:
            raise KeyboardInterrupt
        result = self.method(*args, **options)
        if self.calls == self.call:
            raise KeyboardInterrupt
        return result


# Where a step may be when Ctrl-C comes: before, in and after the launch, and while it delivers.
PLACES = {
    "launch": lambda engine: engine.runner,
    "choose": lambda engine: engine._core._chooser,
    "_deliver": lambda engine: engine._core,
    "admit": lambda engine: engine._core,
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: tiny_model("bamba")])
def test_after_an_interrupt_the_engine_takes_other_requests(make, place, before):
    model = make()
    want = alone(model, prompts()[3])
    with engine_of(model) as engine:
        Interrupts(PLACES[place](engine), place, call=3, before=before)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts(), SamplingParams(max_tokens=10))
        stats = engine.stats()
        assert (stats["running"], stats["waiting"], stats["finished"]["cancelled"]) == (0, 0, 6)
        assert engine.generate([prompts()[3]], SamplingParams(max_tokens=10))[0].tokens == want


def test_an_engine_that_nobody_closed_gives_the_model_back():
    model = tiny_model("mamba")
    classes = [type(module) for module in model.modules()]
    engine = engine_of(model)
    assert [type(module) for module in model.modules()] != classes
    del engine
    gc.collect()
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("make", [lambda: tiny("gemma2", **GEMMA), lambda: tiny_model("mamba")])
def test_a_model_that_runs_through_its_own_modules_has_one_engine(make):
    model = make()
    with engine_of(model) as engine:
        with pytest.raises(UnsupportedModelError, match="another engine runs it: close that one"):
            engine_of(model)
        tokens = engine.generate([[1, 2, 3]], SHORT)[0].tokens
    with engine_of(model) as engine:
        assert engine.generate([[1, 2, 3]], SHORT)[0].tokens == tokens


def test_a_llama_may_have_two_engines(llama):
    with engine_of(llama) as one, engine_of(llama) as other:
        tokens = one.generate([[1, 2, 3]], SHORT)[0].tokens
        assert other.generate([[1, 2, 3]], SHORT)[0].tokens == tokens


KINDS = {
    "tensor of rows": torch.tensor([[1, 2, 3]]),
    "array of rows": np.array([[1, 2, 3]], dtype=np.uint8),
    "list of tensors": [torch.tensor([1, 2, 3])],
    "generator": (prompt for prompt in [[1, 2, 3]]),
    "tuple": ((1, 2, 3),),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_in_many_kinds(llama, kind):
    with engine_of(llama) as engine:
        assert [o.tokens for o in engine.generate(KINDS[kind], SHORT)] == [
            alone(llama, [1, 2, 3], new=6)
        ]
        assert engine.generate([], SHORT) == []


WRONG = [
    ("a text", TypeError, "prompts must be a list of prompts, got 'a text'"),
    ({"input_ids": [[1]]}, TypeError, "prompts must be a list of prompts"),
    (None, TypeError, "prompts must be a list of prompts, got None"),
    ([1, 2, 3], ValueError, "ids must be a list of tokens, got 1"),
    ([[]], ValueError, "ids must hold one token or more, got none"),
    ([[[1, 2], [3]]], ValueError, "ids must be a list of tokens, got lists in it"),
    ([[1, 1000]], ValueError, r"ids must be in 0 \.\. 96, got 1 \.\. 1000"),
]


@pytest.mark.parametrize(("value", "kind", "message"), WRONG)
def test_what_are_no_prompts_is_named(llama, value, kind, message):
    with engine_of(llama) as engine, pytest.raises(kind, match=message):
        engine.generate(value, SHORT)


def test_what_are_no_params_is_named(llama):
    with engine_of(llama) as engine, pytest.raises(TypeError, match="params must be Sampling"):
        engine.generate([[1, 2]], {"max_tokens": 3})
    with pytest.raises(TypeError, match="eos_token_ids must be a list of token ids, got 3"):
        engine_of(llama, eos_token_ids=3)


def test_a_model_without_a_head_is_refused(llama):
    with pytest.raises(UnsupportedModelError, match="load it with AutoModelForCausalLM"):
        effinfer.Engine(llama.model)
