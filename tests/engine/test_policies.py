"""Exit policies: what they score, and that a row's score is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from effinfer.engine import policies
from effinfer.engine.policies import ExitRows

VOCAB, HIDDEN = 50, 24


def rows_of(logits, *, loop=0, hidden=None, arena=None, positions=None, requests=None):
    n = len(logits)
    return ExitRows(
        logits=logits,
        top=logits.argmax(dim=-1).numpy(),
        loops=np.full(n, loop, dtype=np.int32),
        positions=np.arange(n, dtype=np.int32) if positions is None else positions,
        requests=np.arange(n, dtype=np.int64) if requests is None else requests,
        arena=np.arange(n, dtype=np.int32) if arena is None else arena,
        hidden=lambda: hidden,
    )


def pick(rows, order):
    hidden = rows.hidden()
    return ExitRows(
        rows.logits[order],
        rows.top[order],
        rows.loops[order],
        rows.positions[order],
        rows.requests[order],
        rows.arena[order],
        lambda: None if hidden is None else hidden[order],
    )


def random_rows(n, loop, seed=0):
    generator = torch.Generator().manual_seed(1000 * loop + seed)
    logits = 3 * torch.randn(n, VOCAB, generator=generator)
    return rows_of(logits, loop=loop, hidden=torch.randn(n, HIDDEN, generator=generator))


def test_scores_are_what_they_are_called():
    rows = random_rows(9, 0)
    p = rows.logits.double().softmax(-1)
    top = p.topk(2).values
    assert np.allclose(policies.margin(0.5).scores(rows), top[:, 0] - top[:, 1], atol=1e-6)
    assert np.allclose(policies.max_prob(0.5).scores(rows), top[:, 0], atol=1e-6)
    entropy = -(p * p.log()).sum(-1)
    assert np.allclose(policies.entropy(1.0).scores(rows), -entropy, atol=1e-5)
    limit = float(entropy.sort().values[3:5].mean())
    assert policies.entropy(limit).decide(rows).tolist() == (entropy < limit).int().tolist()


def test_entropy_of_certain_and_masked_rows_is_a_number():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[0, 3] = 0.0
    logits[1, :4] = 0.0
    got = policies.entropy(0.1).scores(rows_of(logits))
    assert np.allclose(got, [0.0, -np.log(4)], atol=1e-6)


def test_decide_is_one_where_the_score_is_greater():
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    got = policies.margin(0.4).decide(rows_of(logits))
    assert got.dtype == np.uint8
    assert got.tolist() == [0, 1, 1]
    assert policies.margin(1.0).decide(rows_of(logits)).tolist() == [0, 0, 0]


def test_rows_may_have_thresholds_of_their_own():
    rows = rows_of(torch.tensor([[1.0, 0.0]] * 4))  # a margin of 0.462
    rows.thresholds = np.array([np.nan, 0.46, 0.47, -np.inf])
    assert policies.margin(0.4).decide(rows).tolist() == [1, 1, 0, 1]
    assert policies.margin(0.5).decide(rows).tolist() == [0, 1, 0, 1]


def test_stable_margin_wants_the_same_token_as_the_loop_before():
    policy = policies.stable_margin(0.1)
    sure = torch.zeros(3, VOCAB)
    sure[:, 7] = 9.0
    other = sure.clone()
    other[1] = sure[1].roll(1)
    assert policy.decide(rows_of(other, loop=0)).tolist() == [0, 0, 0]
    assert policy.decide(rows_of(sure, loop=1)).tolist() == [1, 0, 1]
    assert policy.decide(rows_of(sure, loop=2)).tolist() == [1, 1, 1]


def test_what_another_token_left_in_an_arena_row_does_not_count():
    policy = policies.stable_margin(0.1)
    sure = torch.zeros(4, VOCAB)
    sure[:, 7] = 9.0
    policy.decide(rows_of(sure, loop=0))
    again = rows_of(
        sure,
        loop=1,
        positions=np.array([0, 5, 2, 3]),
        requests=np.array([0, 1, 9, 3]),
        arena=np.array([0, 1, 2, 17]),
    )
    assert policy.decide(again).tolist() == [1, 0, 0, 0]  # moved, another request, another row


def test_cosine_is_of_the_hidden_states():
    policy = policies.cosine(0.9)
    first, second = random_rows(5, 0), random_rows(5, 1)
    assert policy.scores(first).tolist() == [-np.inf] * 5
    want = nn.functional.cosine_similarity(first.hidden(), second.hidden())
    assert np.allclose(policy.scores(second), want, atol=1e-6)
    still = rows_of(second.logits, loop=2, hidden=2 * second.hidden())
    assert policy.decide(still).tolist() == [1] * 5
    zero = rows_of(second.logits, loop=3, hidden=torch.zeros(5, HIDDEN))
    assert policy.scores(zero).tolist() == [0.0] * 5


def test_gate_is_a_sigmoid_of_the_module():
    torch.manual_seed(0)
    rows = random_rows(6, 0)
    layer = nn.Linear(HIDDEN, 1)
    want = layer(rows.hidden()).sigmoid()[:, 0].detach()
    assert np.allclose(policies.gate(layer, 0.5).scores(rows), want, atol=1e-6)
    assert np.allclose(policies.gate(lambda h: layer(h)[:, 0], 0.5).scores(rows), want, atol=1e-6)
    with pytest.raises(ValueError, match="gate: module must give one number a row"):
        policies.gate(lambda h: h, 0.5).scores(rows)


def test_replay_exits_at_the_recorded_depth():
    depths = np.array([[1, 2, 4], [3, 1, 1]])
    policy = policies.replay(depths)
    for request in range(4):
        for position in range(6):
            want = depths[request % 2, position % 3]
            got = [
                policy.decide(
                    rows_of(
                        torch.zeros(1, VOCAB),
                        loop=loop,
                        positions=np.array([position]),
                        requests=np.array([request]),
                    )
                )[0]
                for loop in range(4)
            ]
            assert got == [loop + 1 >= want for loop in range(4)]


@pytest.mark.parametrize("name", [*policies.BY_NAME, "gate"])
@pytest.mark.parametrize("vocab", [VOCAB, 70_000])  # long enough for torch to split a lone row
def test_a_row_alone_scores_as_it_does_in_a_batch(name, vocab, monkeypatch):
    monkeypatch.setattr("tests.engine.test_policies.VOCAB", vocab)
    layer = nn.Linear(HIDDEN, 1)

    def make():
        return policies.gate(layer, 0.5) if name == "gate" else policies.BY_NAME[name](0.5)

    loops = [random_rows(9, loop) for loop in range(3)]
    order = np.array([3, 0, 8, 1, 5, 2, 7, 4, 6])
    whole, shuffled, alone = make(), make(), [make() for _ in range(9)]
    for rows in loops:
        want = whole.scores(rows)
        assert shuffled.scores(pick(rows, order)).tolist() == want[order].tolist()
        for i in range(9):
            assert alone[i].scores(pick(rows, np.array([i])))[0] == want[i]


def test_bad_thresholds_and_names_are_refused():
    with pytest.raises(TypeError, match="margin: threshold must be a number"):
        policies.margin("high")
    with pytest.raises(ValueError, match="max_prob: threshold must not be NaN"):
        policies.max_prob(float("nan"))
    with pytest.raises(TypeError, match="gate: module must be callable"):
        policies.gate(3, 0.5)
    for depths in ([], [0, 1], np.ones((1, 1, 1))):
        with pytest.raises(ValueError, match="replay: depths must be"):
            policies.replay(depths)
    with pytest.raises(ValueError, match=r"exit: policy must be one of margin, .* got 'luck'"):
        policies.from_config({"policy": "luck", "threshold": 0.1})
    policy = policies.from_config({"policy": "max_prob", "threshold": 0.25})
    assert isinstance(policy, policies.MaxProb)
    assert policy.threshold == 0.25
