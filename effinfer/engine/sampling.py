"""Tokens from logits: filters, counter-based sampling, log probabilities.

A row's result depends on that row alone, bit for bit: random numbers are a function of (seed,
position), and everything summed over the vocabulary is summed by kernels that take one row at a
time (softmax, cumsum), never by ``torch.sum``, which splits a lone long row over threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from effinfer.engine.params import MAX_LOGPROBS, SamplingParams

ELEMENTS = 1 << 22  # of a working matrix; more rows are taken in turns
CANDIDATES = 256  # most probable tokens that top-p looks at before it sorts the vocabulary
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

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


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) with 53 random bits, a function of (seed, position) and nothing else.

    The splitmix64 sequence of a mixed seed, at ``position``: seeds that differ in one bit share
    nothing.

    Args:
        seeds: ``(n,)`` uint64.
        positions: ``(n,)`` integers of 0 or more.

    Returns:
        ``(n,)`` float64.
    """
    with np.errstate(over="ignore"):
        start = _mix(seeds.astype(np.uint64) + _GOLDEN)
        bits = _mix(start + _GOLDEN * (positions.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def greedy(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token of each row (the first of equals), and which rows are sound.

    Args:
        logits: ``(n, vocab)`` float32.

    Returns:
        Tokens ``(n,)`` int64, and ``(n,)`` bool: False where the row holds NaN or +inf, or
        nothing but -inf.
    """
    values = logits.numpy()
    top = values.argmax(axis=1)  # torch's takes fifteen times as long
    n, vocab = values.shape
    largest = values.reshape(-1).take(top + np.arange(0, n * vocab, vocab))
    return top, np.isfinite(largest)


def sample(
    logits: torch.Tensor, rows: Sequence[RowParams], positions: np.ndarray, history: History
) -> np.ndarray:
    """Choose a token for every row.

    Args:
        logits: ``(n, vocab)`` float32, finite but for -inf; not changed.
        rows: the n requests' parameters.
        positions: ``(n,)`` position of the row in its sequence: that of the token it was fed.
        history: ``history(i)`` gives the tokens of row i's sequence up to its position, for
            penalties.

    Returns:
        Tokens ``(n,)`` int64.
    """
    at_once = max(1, ELEMENTS // logits.shape[1])
    if len(rows) > at_once:
        parts = [
            sample(
                logits[i : i + at_once],
                rows[i : i + at_once],
                positions[i : i + at_once],
                lambda k, i=i: history(i + k),  # type: ignore[misc]
            )
            for i in range(0, len(rows), at_once)
        ]
        return np.concatenate(parts)
    scores = _processed(logits, rows, positions, history)
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        everyone = len(drawn) == len(rows)
        chosen = _draw(
            scores if everyone else scores[drawn],
            [rows[i] for i in drawn],
            positions if everyone else positions[drawn],
        )
        tokens[drawn] = chosen
    return tokens.numpy()


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


def _processed(
    logits: torch.Tensor, rows: Sequence[RowParams], positions: np.ndarray, history: History
) -> torch.Tensor:
    """The logits with penalties, and without stop tokens that come too early."""
    early = [
        i
        for i, row in enumerate(rows)
        if row.stop_ids and positions[i] + 1 - row.prompt_tokens < row.params.min_tokens
    ]
    penalized = [i for i, row in enumerate(rows) if row.params.penalized]
    if not early and not penalized:
        return logits
    logits = logits.clone()
    for i in penalized:
        _penalize(logits[i], rows[i], history(i))
    for i in early:
        logits[i, list(rows[i].stop_ids)] = -torch.inf
    return logits


def _penalize(scores: torch.Tensor, row: RowParams, tokens: np.ndarray) -> None:
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(tokens).astype(np.int64))
        values = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        ids, counts = np.unique(tokens[row.prompt_tokens :], return_counts=True)
        less = params.presence_penalty + params.frequency_penalty * counts
        generated = torch.from_numpy(ids.astype(np.int64))
        scores[generated] -= torch.from_numpy(less.astype(np.float32))


def _draw(scores: torch.Tensor, rows: Sequence[RowParams], positions: np.ndarray) -> torch.Tensor:
    """One token per row, from the distribution that temperature and the filters leave."""
    params = [row.params for row in rows]
    scores = scores / _column([p.temperature for p in params])
    if any(0 < p.top_k < scores.shape[1] for p in params):
        scores = keep_top_k(scores, [p.top_k for p in params])
    if any(p.top_p < 1.0 for p in params):
        scores = keep_top_p(scores, [p.top_p for p in params])
    if any(p.min_p > 0.0 for p in params):
        scores = keep_min_p(scores, [p.min_p for p in params])
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    seeds = np.array([row.seed & (2**64 - 1) for row in rows], dtype=np.uint64)
    # The token sampled from a row is the one at the next position.
    u = torch.from_numpy(uniform(seeds, positions + 1))[:, None]
    # The first token whose cumulative probability exceeds u: one of probability zero never does.
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]


def keep_top_k(scores: torch.Tensor, k: Sequence[int]) -> torch.Tensor:
    """``scores (n, vocab)``, -inf below row i's ``k[i]``-th largest; 0 keeps all."""
    vocab = scores.shape[1]
    places = np.array([vocab - one if 0 < one < vocab else 0 for one in k])
    ordered = np.partition(scores.numpy(), np.unique(places), axis=1)
    least = torch.from_numpy(ordered[np.arange(len(places)), places])[:, None]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: torch.Tensor, p: Sequence[float]) -> torch.Tensor:
    """``scores (n, vocab)``, -inf where more probable tokens reach ``p[i]`` together.

    Tokens as probable as the last one kept are kept too, so that order among equals has no say.
    """
    probs = scores.softmax(dim=-1)
    values, wanted = probs.numpy(), np.array(p)[:, None]
    first = max(0, values.shape[1] - CANDIDATES)
    largest = np.sort(np.partition(values, first, axis=1)[:, first:], axis=1)
    least = _least_kept(largest, wanted)
    short = np.flatnonzero(largest.sum(axis=1, dtype=np.float64) < wanted[:, 0])
    if len(short):
        least[short] = _least_kept(np.sort(values[short], axis=1), wanted[short])
    least[wanted >= 1.0] = 0.0
    return scores.masked_fill(probs < torch.from_numpy(least), -torch.inf)


def keep_min_p(scores: torch.Tensor, p: Sequence[float]) -> torch.Tensor:
    """``scores (n, vocab)``, -inf where a token is less than ``p[i]`` times as probable as the
    row's most probable one."""
    floor = _column([math.log(value) if value > 0.0 else -math.inf for value in p])
    below = scores - scores.amax(dim=-1, keepdim=True) < floor
    return scores.masked_fill(below, -torch.inf)


def _least_kept(ascending: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The smallest probability before which less than ``p`` has been summed up, ``(n, 1)``."""
    descending = ascending[:, ::-1]
    before = descending.cumsum(axis=1, dtype=np.float64) - descending
    last = (before < p).sum(axis=1, keepdims=True) - 1
    return np.take_along_axis(descending, last, axis=1)


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]
