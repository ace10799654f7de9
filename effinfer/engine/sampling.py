"""Tokens from logits: filters, counter-based sampling, log probabilities.

A row's result depends on that row alone, bit for bit: random numbers are a function of (seed,
position), and nothing is summed over rows (``csrc/engine/sampler``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from effinfer._native import module
from effinfer.engine.params import MAX_LOGPROBS, SamplingParams

History = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities behind one token: its own, and the most probable tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RowParams:
    """What the sampler knows of the request behind a row."""

    params: SamplingParams
    seed: int
    prompt_tokens: int
    stop_ids: tuple[int, ...] = ()  # not to be generated before min_tokens

    @property
    def plain(self) -> bool:
        """True when the token is the row's largest logit and nothing else is asked for."""
        p = self.params
        return p.greedy and not p.penalized and p.logprobs is None and p.min_tokens == 0

    @cached_property
    def penalized(self) -> bool:
        """True when the tokens before have a say."""
        return self.params.penalized

    @cached_property
    def native(self) -> Any:
        """The same for native code."""
        p = self.params
        return module("_C").Sampling(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition=p.repetition_penalty,
            presence=p.presence_penalty,
            frequency=p.frequency_penalty,
            seed=self.seed & (2**64 - 1),
            prompt=self.prompt_tokens,
            min_tokens=p.min_tokens,
            stop_ids=self.stop_ids,
        )


def greedy(logits: torch.Tensor) -> np.ndarray:
    """The most probable token of each row, the first of equals.

    Args:
        logits: ``(n, vocab)`` float32.

    Returns:
        Tokens ``(n,)`` int32; -1 where the row holds NaN or +inf, or nothing but -inf.
    """
    tokens = np.empty(len(logits), dtype=np.int32)
    module("_C").most_probable(logits, tokens)
    return tokens


def sample(
    logits: torch.Tensor, rows: Sequence[RowParams], positions: np.ndarray, history: History
) -> np.ndarray:
    """Choose a token for every row: penalties, temperature, top-k, top-p, min-p, in this order.

    Tokens as probable as the last one that a filter keeps are kept too. The token drawn is the first
    whose cumulative probability, in the order of the vocabulary, exceeds a number in [0, 1) that is
    splitmix64's of the seed and the token's position.

    Args:
        logits: ``(n, vocab)`` float32, finite but for -inf; not changed.
        rows: the n requests' parameters.
        positions: ``(n,)`` position of the row in its sequence: that of the token it was fed.
        history: ``history(i)`` gives the tokens of row i's sequence up to its position, int32, for
            penalties.

    Returns:
        Tokens ``(n,)`` int32.

    Raises:
        ValueError: a row has no token left.
    """
    tokens = np.empty(len(rows), dtype=np.int32)
    histories = [history(i) if row.penalized else None for i, row in enumerate(rows)]
    places = np.ascontiguousarray(positions, dtype=np.int32)
    module("_C").sample(logits, [row.native for row in rows], places, histories, tokens)
    if -1 in tokens.tolist():
        raise ValueError("sample: a row has no token left to choose from")
    return tokens


def token_logprobs(
    logits: torch.Tensor, tokens: np.ndarray, counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Log probabilities of the chosen tokens, and of each row's ``counts[i]`` most probable.

    Args:
        logits: ``(n, vocab)`` float32, the model's own.
        tokens: ``(n,)`` the chosen ones.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].tolist()
    if not any(counts):
        return [TokenLogprobs(value, ()) for value in own]
    # Always the same k: which of equals are named doesn't depend on how many are asked for.
    top = logprobs.topk(min(MAX_LOGPROBS, logits.shape[1]))
    ids, values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprobs(value, tuple(zip(row_ids[:n], row_values[:n], strict=True)))
        for value, row_ids, row_values, n in zip(own, ids, values, counts, strict=True)
    ]
