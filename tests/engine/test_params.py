"""SamplingParams refuses what it can't do, by the field's name."""

from __future__ import annotations

import pytest

from effinfer.engine.params import SamplingParams

WRONG = [
    ("max_tokens", 0, ValueError),
    ("max_tokens", -5, ValueError),
    ("max_tokens", 1.5, TypeError),
    ("max_tokens", True, TypeError),
    ("temperature", -0.1, ValueError),
    ("temperature", float("nan"), ValueError),
    ("temperature", float("inf"), ValueError),
    ("temperature", "hot", TypeError),
    ("top_k", -1, ValueError),
    ("top_k", 2.0, TypeError),
    ("top_p", 0.0, ValueError),
    ("top_p", 1.01, ValueError),
    ("min_p", -0.5, ValueError),
    ("min_p", 2, ValueError),
    ("repetition_penalty", 0.0, ValueError),
    ("presence_penalty", float("nan"), ValueError),
    ("frequency_penalty", None, TypeError),
    ("seed", 2**64, ValueError),
    ("seed", "x", TypeError),
    ("stop", "", ValueError),
    ("stop", ["a", ""], ValueError),
    ("stop", [1], TypeError),
    ("stop", 7, TypeError),
    ("stop", ["a"] * 65, ValueError),
    ("stop_token_ids", 3, TypeError),
    ("stop_token_ids", ["3"], TypeError),
    ("stop_token_ids", [-1], ValueError),
    ("ignore_eos", 1, TypeError),
    ("logprobs", -1, ValueError),
    ("logprobs", 65, ValueError),
    ("logprobs", True, TypeError),
    ("min_tokens", -1, ValueError),
    ("min_tokens", 17, ValueError),
    ("mode", "fast", ValueError),
    ("mode", 1, ValueError),
    ("min_loops", 0, ValueError),
    ("min_loops", None, TypeError),
    ("max_loops", 0, ValueError),
    ("max_loops", 1.5, TypeError),
    ("exit_threshold", float("nan"), ValueError),
    ("exit_threshold", "high", TypeError),
]


@pytest.mark.parametrize(("field", "value", "error"), WRONG)
def test_a_bad_field_is_named(field, value, error):
    with pytest.raises(error, match=f"^SamplingParams: {field} must"):
        SamplingParams(**{field: value})


def test_depths_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"max_loops must be in \[3, .*got 2"):
        SamplingParams(min_loops=3, max_loops=2)
    with pytest.raises(ValueError, match=r"exit_threshold must be None in mode 'full', got 0\.5"):
        SamplingParams(mode="full", exit_threshold=0.5)


def test_fields_are_normalised():
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], temperature=1, top_p=1)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert isinstance(params.temperature, float)
    assert params == SamplingParams(stop=("end",), stop_token_ids=(3, 4), temperature=1.0)
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(3, 4), temperature=1))


def test_defaults_are_greedy_and_unpenalized():
    assert SamplingParams().greedy
    assert not SamplingParams().penalized
    assert not SamplingParams(temperature=0.5).greedy
    for field in ("presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{field: 0.5}).penalized
    assert SamplingParams(repetition_penalty=1.1).penalized
