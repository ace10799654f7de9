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
# Most probable tokens that the filters look at before they sort the vocabulary: where top-k keeps
# fewer, and otherwise.
FEW_CANDIDATES, CANDIDATES = 64, 256
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
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows):
        return np.asarray(_draw(scores, rows, positions))
    tokens: np.ndarray = scores.numpy().argmax(axis=1)
    if drawn:
        some = _draw(scores[drawn], [rows[i] for i in drawn], positions[drawn])
        tokens[drawn] = some.numpy()
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
    weights = scores.softmax(dim=-1)
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        weights *= scores >= least_kept(scores, weights, params)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    seeds = np.array([row.seed & (2**64 - 1) for row in rows], dtype=np.uint64)
    # The token sampled from a row is the one at the next position.
    u = torch.from_numpy(uniform(seeds, positions + 1))[:, None]
    # The first token whose cumulative weight exceeds u: one of weight zero never does.
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]


def least_kept(
    scores: torch.Tensor, probs: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """The smallest score that top-k, then top-p, then min-p leave in each row.

    Tokens as probable as the last one kept are kept too, so that order among equals has no say.

    Args:
        scores: ``(n, vocab)``, logits over temperature.
        probs: ``(n, vocab)``, their softmax.
        params: the n rows'.

    Returns:
        ``(n, 1)``; -inf where all are left.
    """
    vocab = scores.shape[1]
    k = np.array([p.top_k if p.top_k < vocab else 0 for p in params])
    p = np.array([one.top_p for one in params])
    min_p = np.array([math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params])
    values, largest = scores.numpy(), scores.amax(dim=-1).numpy()
    least = (largest + min_p).astype(values.dtype)
    filtered = np.flatnonzero((k > 0) | (p < 1.0))
    if len(filtered):
        certain = probs.amax(dim=-1).numpy()
        few = k[filtered].min() > 0 and k[filtered].max() < FEW_CANDIDATES
        for candidates in (min(FEW_CANDIDATES if few else CANDIDATES, vocab), vocab):
            some = values if len(filtered) == len(values) else values[filtered]
            if candidates < vocab:
                some = np.partition(some, vocab - candidates, axis=1)[:, vocab - candidates :]
            descending = np.sort(some, axis=1)[:, ::-1]
            found, enough = _least_of(
                descending, certain[filtered], k[filtered], p[filtered], candidates == vocab
            )
            least[filtered] = np.maximum(least[filtered], np.where(enough, found, -np.inf))
            filtered = filtered[~enough]
            if not len(filtered):
                break
    return torch.from_numpy(least)[:, None]


def _least_of(
    descending: np.ndarray, largest: np.ndarray, k: np.ndarray, p: np.ndarray, complete: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The last score that top-k and top-p keep of each row's largest, and whether those are enough.

    Args:
        descending: ``(n, candidates)`` scores.
        largest: ``(n,)`` the first one's probability among all of the vocabulary.
        k, p: ``(n,)``; k of 0 keeps all.
        complete: the candidates are all there are.
    """
    rows, candidates = np.arange(len(k)), descending.shape[1]
    kth = np.where(k > 0, descending[rows, np.minimum(k, candidates) - 1], -np.inf)
    weights = np.exp((descending - descending[:, :1]).astype(np.float64))
    weights *= descending >= kth[:, None]
    summed = weights.cumsum(axis=1)
    # Of all that top-k leaves; without it, of the vocabulary.
    total = np.where(k > 0, summed[:, -1], 1.0 / largest.astype(np.float64))
    inside = (summed - weights < (p * total)[:, None]) & (descending >= kth[:, None])
    found = descending[rows, inside.sum(axis=1) - 1]
    found = np.where(p < 1.0, found, kth)
    # With top-k: no equals of the k-th are left out.
    enough = np.where(k > 0, kth > descending[:, -1], summed[:, -1] >= p * total)
    return found, enough | complete


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]
