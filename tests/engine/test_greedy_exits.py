"""The native way to choose must say what the policies and numpy say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effinfer.engine import policies, sampling
from effinfer.engine.greedy_exits import GreedyExits
from effinfer.engine.policies import ExitPolicy, ExitRows


def rows_of(logits: torch.Tensor) -> ExitRows:
    n = np.arange(len(logits))
    return ExitRows(logits, sampling.greedy(logits), n, n, n, n, lambda: torch.empty(0))


@pytest.mark.parametrize("policy", [policies.margin(0.3), policies.max_prob(0.5)])
@pytest.mark.parametrize("vocab", [2, 40, 1021])
def test_tokens_and_exits(policy: ExitPolicy, vocab: int) -> None:
    judge = GreedyExits(policy)
    for seed in range(5):
        logits = 6 * torch.randn(1 + 3 * seed, vocab, generator=torch.Generator().manual_seed(seed))
        chosen = judge(logits)
        assert chosen is not None
        assert chosen[0].tolist() == sampling.greedy(logits).tolist()
        assert chosen[1].tolist() == policy.decide(rows_of(logits)).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_unsound_rows(value: float) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = value
    assert GreedyExits(policies.margin(0.1))(logits) is None
    logits[1] = -torch.inf
    assert GreedyExits(policies.margin(0.1))(logits) is None


def test_the_threshold_may_change() -> None:
    policy = policies.margin(2.0)
    judge, logits = GreedyExits(policy), torch.randn(4, 9)
    assert judge(logits)[1].tolist() == [0] * 4  # type: ignore[index]
    policy.threshold = -1.0
    assert judge(logits)[1].tolist() == [1] * 4  # type: ignore[index]


def test_others_are_asked() -> None:
    class Own(policies.Margin):
        pass

    assert not GreedyExits.judges(Own(0.1))
    assert not GreedyExits.judges(policies.entropy(0.1))
    assert not GreedyExits.judges(None)
