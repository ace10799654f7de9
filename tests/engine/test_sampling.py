"""Sampling: transformers' filters, the right distribution, and rows that don't see each other."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers.generation import logits_process as hf

from effinfer.engine import sampling
from effinfer.engine.params import SamplingParams
from effinfer.engine.sampling import RowParams

VOCAB = 300


def logits_of(n, vocab=VOCAB, seed=0, scale=3.0):
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def no_history(row):
    raise AssertionError("nothing asked for the history")


def kept(scores):
    return scores > -torch.inf


# splitmix64's first outputs from state 0, as published with the algorithm.
SPLITMIX = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]


def test_the_mixer_is_splitmix64():
    with np.errstate(over="ignore"):
        states = sampling._GOLDEN * np.arange(1, 5, dtype=np.uint64)
        assert sampling._mix(states).tolist() == SPLITMIX


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds():
    n = 40_000
    along = [
        sampling.uniform(np.full(n, 7, np.uint64), np.arange(n)),
        sampling.uniform(np.arange(n, dtype=np.uint64), np.full(n, 3)),
    ]
    for u in along:
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
        assert 50 < chi2 < 170  # 99 degrees of freedom: outside once in 20,000 tries
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(*along)[0, 1]) < 0.02


@given(
    seed=st.integers(0, 2**20),
    k=st.integers(1, VOCAB + 5),
    p=st.floats(0.01, 0.999),
    min_p=st.floats(0.001, 1.0),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
@settings(max_examples=25, deadline=None)
def test_filters_keep_what_transformers_keeps(seed, k, p, min_p, scale):
    x = logits_of(3, seed=seed, scale=scale).double()
    filters = [hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p), hf.MinPLogitsWarper(min_p)]
    params = [{"top_k": k}, {"top_p": p}, {"min_p": min_p}]
    for one, alone in zip(params, filters, strict=True):
        assert torch.equal(left(x, [one] * 3), kept(alone(None, x)))
    want = x
    for one in filters:
        want = one(None, want)
    together = {"top_k": k, "top_p": p, "min_p": min_p}
    assert torch.equal(left(x, [together, {}, together])[[0, 2]], kept(want)[[0, 2]])


def left(scores, params):
    """Which tokens the filters leave."""
    params = [SamplingParams(temperature=1.0, **one) for one in params]
    return scores >= sampling.least_kept(scores, scores.softmax(-1), params)


def test_filters_take_each_rows_own_number():
    x = logits_of(4).double()
    by_k = left(x, [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": VOCAB + 1}])
    assert by_k.sum(dim=1).tolist() == [VOCAB, 1, 5, VOCAB]
    by_p = left(x, [{}, {"top_p": 1e-9}, {"top_p": 0.5}, {"top_k": 7}])
    assert by_p.sum(dim=1)[[0, 1, 3]].tolist() == [VOCAB, 1, 7]
    by_min_p = left(x, [{}, {"min_p": 1.0}, {"min_p": 0.1}, {}])
    assert by_min_p.sum(dim=1)[[0, 1, 3]].tolist() == [VOCAB, 1, VOCAB]


def test_filters_past_their_candidates_sort_the_rest():
    vocab = 4 * sampling.CANDIDATES
    flat = logits_of(4, vocab=vocab, scale=0.01).double()
    got = left(flat, [{"top_p": 0.9}, {"top_p": 0.05}, {"top_k": vocab - 9}, {"top_k": 3}])
    assert torch.equal(got[:1], kept(hf.TopPLogitsWarper(0.9)(None, flat[:1])))
    assert torch.equal(got[1:2], kept(hf.TopPLogitsWarper(0.05)(None, flat[1:2])))
    assert got.sum(dim=1)[2:].tolist() == [vocab - 9, 3]


def test_equals_at_the_border_are_kept_together():
    many = torch.zeros(1, 3 * sampling.CANDIDATES, dtype=torch.float64)
    many[0, 0] = 1.0
    assert left(many, [{"top_k": 2}]).all()
    assert left(many, [{"top_k": 2, "top_p": 0.5}]).all()
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0, -5.0]], dtype=torch.float64)
    assert left(x, [{"top_k": 2}]).tolist() == [[True] * 4 + [False]]
    assert left(x, [{"top_p": 0.6}]).tolist() == [[True] * 4 + [False]]


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_penalties_are_transformers_and_openais(scale):
    x = logits_of(1, scale=scale)
    tokens = np.array([5, 9, 9, 11, 5, 5, 20], dtype=np.int32)
    row = RowParams(SamplingParams(repetition_penalty=1.7), 0, prompt_tokens=3)
    got = sampling._processed(x, [row], np.array([6]), lambda i: tokens)
    want = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(tokens).long()[None], x)
    assert torch.equal(got, want)

    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = sampling._processed(x, [RowParams(params, 0, 3)], np.array([6]), lambda i: tokens)
    want = x.clone()
    want[0, 5] -= 0.5 + 2 * 0.25
    want[0, 11] -= 0.5 + 0.25
    want[0, 20] -= 0.5 + 0.25
    assert torch.allclose(got, want, atol=1e-6, rtol=0)
    untouched = [i for i in range(VOCAB) if i not in (5, 11, 20)]
    assert torch.equal(got[:, untouched], x[:, untouched])


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
    row = RowParams(SamplingParams(temperature=0.7, top_k=8, top_p=0.95, min_p=0.02), 11, 0)
    filters = [
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(8),
        hf.TopPLogitsWarper(0.95),
        hf.MinPLogitsWarper(0.02),
    ]
    want = x
    for f in filters:
        want = f(None, want)
    want = want.softmax(-1)[0].double().numpy()
    got = sampling.sample(x.expand(n, -1), [row] * n, np.arange(n), no_history)
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


def test_rows_taken_in_turns_are_the_rows_taken_at_once(monkeypatch):
    x = logits_of(7)
    rows = [RowParams(SamplingParams(temperature=1.0, repetition_penalty=2.0), 3, 0)] * 7
    tokens = [np.arange(i + 1, dtype=np.int32) for i in range(7)]
    positions = np.arange(7)
    whole = sampling.sample(x, rows, positions, lambda i: tokens[i])
    monkeypatch.setattr(sampling, "ELEMENTS", 2 * VOCAB)
    assert sampling.sample(x, rows, positions, lambda i: tokens[i]).tolist() == whole.tolist()


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


def test_greedy_takes_the_first_of_equals_and_reports_unsound_rows():
    x = torch.zeros(5, 9)
    x[1, 4] = float("nan")
    x[2, 4] = float("inf")
    x[3] = -torch.inf
    x[4, :7] = -torch.inf
    tokens, sound = sampling.greedy(x)
    assert sound.tolist() == [True, False, False, False, True]
    assert tokens[[0, 4]].tolist() == [0, 7]


def test_sampling_leaves_the_logits_as_they_are():
    x = logits_of(2)
    before = x.clone()
    row = RowParams(SamplingParams(temperature=1.0, top_k=3, repetition_penalty=2.0), 0, 1)
    sampling.sample(x, [row, row], np.array([2, 2]), lambda i: np.array([1, 2, 3], np.int32))
    assert torch.equal(x, before)
