"""Sampling: transformers' filters, the right distribution, and rows that don't see each other."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers.generation import logits_process as hf

from effinfer import _native
from effinfer.engine import sampling
from effinfer.engine.params import SamplingParams
from effinfer.engine.sampling import RowParams

VOCAB = 300
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def logits_of(n, vocab=VOCAB, seed=0, scale=3.0):
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def no_history(row):
    raise AssertionError("nothing asked for the history")


def uniform(seed, position):
    """By the definition: splitmix64, from the mixed seed on."""
    return (mix((mix((seed + GOLDEN) & MASK) + GOLDEN * (position + 1)) & MASK) >> 11) * 2.0**-53


def mix(x):
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def probabilities(logits, params, history=(), prompt=0):
    """What a token is drawn from, in float64 and by transformers' own processors."""
    x = logits.double()[None]
    if params.repetition_penalty != 1.0:
        ids = torch.tensor(history)[None]
        x = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x)
    counts = np.bincount(history[prompt:], minlength=x.shape[1]) if len(history) else 0
    x = x - torch.as_tensor(
        (counts > 0) * params.presence_penalty + counts * params.frequency_penalty
    )
    if params.temperature == 0.0:
        return torch.nn.functional.one_hot(x[0].argmax(), x.shape[1]).double()
    filters = [
        hf.TemperatureLogitsWarper(params.temperature),
        *([hf.TopKLogitsWarper(params.top_k)] if params.top_k else []),
        *([hf.TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []),
        *([hf.MinPLogitsWarper(params.min_p)] if params.min_p else []),
    ]
    for one in filters:
        x = one(None, x)
    return x.softmax(-1)[0]


def check_draw(token, probs, u):
    """``token`` is the first whose cumulative probability exceeds ``u``."""
    cumulative = probs.cumsum(0)
    assert probs[token] > 0
    assert cumulative[token] - probs[token] - 1e-6 <= u <= cumulative[token] + 1e-6


# splitmix64's first outputs from state 0, as published with the algorithm.
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]


def test_random_numbers_are_splitmix64s():
    assert [mix(GOLDEN * i & MASK) for i in range(1, 5)] == SPLITMIX
    native = _native.module("_C").uniform
    for seed in (0, 7, 2**63 + 5, MASK):
        for position in (0, 1, 1000, 2**31 - 1):
            assert native(seed, position) == uniform(seed, position)


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds():
    n = 40_000
    native = _native.module("_C").uniform
    along = [
        np.array([native(7, position) for position in range(n)]),
        np.array([native(seed, 3) for seed in range(n)]),
    ]
    for u in along:
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
        assert 50 < chi2 < 170  # 99 degrees of freedom: outside once in 20,000 tries
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(*along)[0, 1]) < 0.02


@pytest.mark.parametrize("vocab", [1, 7, VOCAB, 5000])
@given(
    seed=st.integers(0, 2**20),
    k=st.sampled_from([0, 1, 5, 40, 200, 10_000]),
    p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tokens_are_drawn_from_what_transformers_filters_leave(
    isa, vocab, seed, k, p, min_p, temperature, scale
):
    x = logits_of(1, vocab, seed, scale)
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=min_p)
    probs = probabilities(x[0], params)
    positions = np.arange(40)
    got = sampling.sample(
        x.expand(40, -1), [RowParams(params, seed, 0)] * 40, positions, no_history
    )
    for token, position in zip(got.tolist(), positions.tolist(), strict=True):
        check_draw(token, probs, uniform(seed, position + 1))


def kept(scores, draws=400, **params):
    """Which tokens come up among many draws."""
    row = RowParams(SamplingParams(temperature=1.0, **params), 5, 0)
    x = torch.as_tensor(scores, dtype=torch.float32).expand(draws, -1)
    return set(sampling.sample(x, [row] * draws, np.arange(draws), no_history).tolist())


def test_equals_at_the_border_are_kept_together(isa):
    assert kept([1.0, 0.0, 0.0, 0.0, -9.0], top_k=2) == {0, 1, 2, 3}
    assert kept([1.0, 0.0, 0.0, 0.0, -9.0], top_p=0.6) == {0, 1, 2, 3}
    assert kept([1.0, 0.0, 0.0, 0.0, -9.0], top_p=0.4) == {0}
    many = torch.zeros(600)
    many[0] = 1.0
    assert len(kept(many, 4000, top_k=2)) > 590
    assert len(kept(many, 4000, top_k=2, top_p=0.5)) > 590


def test_each_row_has_its_own_filters(isa):
    x = logits_of(4)
    params = [{}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]
    rows = [RowParams(SamplingParams(temperature=1.0, **one), 3, 0) for one in params]
    got = sampling.sample(x, rows, np.full(4, 9), no_history)
    assert got[1:].tolist() == x[1:].argmax(dim=1).tolist()
    check_draw(int(got[0]), x[0].double().softmax(-1), uniform(3, 10))


def test_nearly_flat_logits_take_more_candidates_than_the_first(isa):
    x = logits_of(1, vocab=40_000, scale=0.01)
    params = SamplingParams(temperature=1.0, top_p=0.95)
    probs = probabilities(x[0], params)
    got = sampling.sample(x.expand(6, -1), [RowParams(params, 2, 0)] * 6, np.arange(6), no_history)
    for position, token in enumerate(got.tolist()):
        check_draw(token, probs, uniform(2, position + 1))


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_penalties_are_transformers_and_openais(isa, scale, temperature):
    x = logits_of(1, scale=scale)
    history = np.array([5, 9, 9, 11, 5, 5, 20], dtype=np.int32)
    for penalties in (
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"repetition_penalty": 0.6, "presence_penalty": -3.0, "frequency_penalty": -1.5},
    ):
        params = SamplingParams(temperature=temperature, **penalties)
        probs = probabilities(x[0], params, history, prompt=3)
        row = RowParams(params, 1, prompt_tokens=3)
        got = sampling.sample(
            x.expand(60, -1), [row] * 60, np.arange(60), lambda i: history
        ).tolist()
        for position, token in enumerate(got):
            check_draw(token, probs, uniform(1, position + 1))


def test_a_row_without_a_token_left_is_an_error():
    x = torch.full((1, 4), -torch.inf)
    x[0, 2] = 1.0
    row = RowParams(SamplingParams(temperature=1.0, min_tokens=3), 0, 1, stop_ids=(2,))
    with pytest.raises(ValueError, match="no token left"):
        sampling.sample(x, [row], np.array([1]), no_history)


def test_no_stop_token_before_min_tokens():
    x = logits_of(1)
    x[0, 42] = 100.0
    row = RowParams(SamplingParams(min_tokens=3), 0, prompt_tokens=10, stop_ids=(42,))
    for generated in range(6):
        got = sampling.sample(x, [row], np.array([9 + generated]), no_history)
        assert (got[0] == 42) == (generated >= 3)


def test_sampled_tokens_follow_the_distribution():
    n = 20_000
    x = logits_of(1, vocab=12, scale=1.0)
    params = SamplingParams(temperature=0.7, top_k=8, top_p=0.95, min_p=0.02)
    want = probabilities(x[0], params).numpy()
    rows = [RowParams(params, 11, 0)] * n
    got = sampling.sample(x.expand(n, -1), rows, np.arange(n), no_history)
    counts = np.bincount(got, minlength=12)
    assert (counts[want == 0] == 0).all()
    inside = want > 0
    chi2 = ((counts - n * want)[inside] ** 2 / (n * want[inside])).sum()
    assert chi2 < 35  # at most 11 degrees of freedom: above once in 5,000 tries


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(16),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    frequency_penalty=st.sampled_from([0.0, -0.2]),
    min_tokens=st.sampled_from([0, 4]),
)


@given(params=st.lists(PARAMS, min_size=2, max_size=9), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_row_alone_gets_the_token_it_gets_in_a_batch(params, seed):
    n = len(params)
    x = logits_of(n, seed=seed, scale=1.0)
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCAB, 8 + i).astype(np.int32) for i in range(n)]
    positions = np.array([len(t) - 1 for t in tokens])
    rows = [RowParams(p, seed + i, prompt_tokens=5, stop_ids=(1, 2)) for i, p in enumerate(params)]
    batch = sampling.sample(x, rows, positions, lambda i: tokens[i])
    order = rng.permutation(n)
    shuffled = sampling.sample(
        x[order], [rows[i] for i in order], positions[order], lambda i: tokens[order[i]]
    )
    assert shuffled.tolist() == batch[order].tolist()
    for i in range(n):
        alone = sampling.sample(
            x[i : i + 1], rows[i : i + 1], positions[i : i + 1], lambda _, i=i: tokens[i]
        )
        assert alone[0] == batch[i]


def test_logprobs_are_the_models_and_independent_of_the_batch():
    x = logits_of(3, vocab=70_000)  # long enough for torch.sum to split a lone row over threads
    tokens = np.array([4, 5, 6])
    want = x.double().log_softmax(-1)
    got = sampling.token_logprobs(x, tokens, [0, 2, 5])
    for i, entry in enumerate(got):
        assert abs(entry.logprob - want[i, tokens[i]].item()) < 1e-4
        assert len(entry.top) == [0, 2, 5][i]
        assert [t for t, _ in entry.top] == want[i].topk(5).indices.tolist()[: len(entry.top)]
        assert (
            sampling.token_logprobs(x[i : i + 1], tokens[i : i + 1], [len(entry.top)])[0] == entry
        )


def test_greedy_takes_the_first_of_equals_and_reports_unsound_rows(isa):
    x = torch.zeros(5, 9)
    x[1, 4] = float("nan")
    x[2, 4] = float("inf")
    x[3] = -torch.inf
    x[4, :7] = -torch.inf
    assert sampling.greedy(x).tolist() == [0, -1, -1, -1, 7]


def test_sampling_leaves_the_logits_as_they_are():
    x = logits_of(2)
    before = x.clone()
    row = RowParams(SamplingParams(temperature=1.0, top_k=3, repetition_penalty=2.0), 0, 1)
    sampling.sample(x, [row, row], np.array([2, 2]), lambda i: np.array([1, 2, 3], np.int32))
    assert torch.equal(x, before)
