"""From a launch's logits to tokens and exits, each request on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from effinfer.engine import sampling
from effinfer.engine.batch import Batch
from effinfer.engine.greedy_exits import GreedyExits
from effinfer.engine.handle import Handle
from effinfer.engine.policies import ExitPolicy, ExitRows
from effinfer.engine.sampling import RowParams, TokenLogprobs
from effinfer.engine.setup import Parts
from effinfer.engine.text import TextStream

Array = np.ndarray[Any, Any]
_NONE, _NOTHING = torch.empty(0), np.empty(0, dtype=np.int64)
_COLUMNS = ("wanted_loops", "wanted_positions", "wanted_arena", "wanted_ids")


@dataclass(slots=True)
class Live:
    """A request that the scheduler knows.

    Attributes:
        handle: its owner's end.
        row: how its tokens are chosen.
        text: looks for its stop strings; None without.
        plain: nothing but the most probable token is asked for.
        watched: more is to be done with a token than to hand it on.
        stopped: a stop string was found.
        logprobs: by position, until the token there is certain.
        error: what went wrong.
    """

    handle: Handle
    row: RowParams
    text: TextStream | None = None
    plain: bool = field(init=False)
    watched: bool = field(init=False)
    stopped: bool = False
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        self.plain = self.row.plain
        self.watched = self.text is not None or self.row.params.logprobs is not None


class Chooser:
    """Samples the wanted rows and asks the exit policy, for one engine.

    Args:
        parts: the engine's scheduler, whose launch's rows are chosen from; its runner, for hidden
            states; and its policy.
        batch: the launch, as the runner sees it.
        live: the engine's requests by id.
        fail: called with a request id and what is wrong with it.

    Attributes:
        thresholds: by request id, those that replace the policy's.
    """

    def __init__(
        self,
        parts: Parts,
        batch: Batch,
        live: dict[int, Live],
        fail: Callable[[int, str], None],
    ) -> None:
        scheduler = self._scheduler = parts.scheduler
        self._runner = parts.runner
        self._policy = parts.policy
        self._natively = (
            GreedyExits(parts.policy)
            if parts.policy is not None and GreedyExits.judges(parts.policy)
            else None
        )
        self._batch = batch
        self._live = live
        self._fail = fail
        self.thresholds: dict[int, float] = {}
        self._columns = [getattr(scheduler, name) for name in _COLUMNS]
        self._ids, self._positions = scheduler.wanted_ids, scheduler.wanted_positions
        self._any = np.zeros_like(scheduler.wanted)  # tokens where none counts
        self._views: dict[tuple[int, int], list[Array]] = {}
        # Decided before the logits: exits, and which rows have logits.
        self._early: tuple[Array, Array] | None = None
        if self._policy is not None and not self._policy.needs_logits:
            batch.before_logits = self._decide_early

    def choose(self, logits: torch.Tensor | None, plain: bool) -> tuple[Array, Array | None]:
        """A token ``(n,)`` int32 and whether it may be taken early ``(n,)`` uint8, for every row.

        Args:
            logits: ``(n, vocab)`` float32 of the n wanted rows; of fewer where the policy, asked
                before, lets others go on: those get any token.
            plain: no live request asks for more than its most probable token.
        """
        early, self._early = self._early, None
        if early is None:
            assert logits is not None
            if self._natively is not None and plain and not self.thresholds:
                chosen = self._natively(logits) if self._scheduler.n_early > 0 else None
                if chosen is not None:
                    return chosen
            tokens = top = sampling.greedy(logits)
            exits = kept = None
            if self._policy is not None and self._scheduler.n_early > 0:
                exits = self._decide(self._policy, logits, top)
        else:
            exits, kept = early
            if logits is None:
                return self._any[: len(exits)], exits
            tokens = np.zeros(len(exits), dtype=np.int32)
            top = sampling.greedy(logits)
            tokens[kept] = top
        if -1 in tokens.tolist():
            for request_id in self._ids[np.flatnonzero(tokens == -1)].tolist():
                self._fail(request_id, "the model gave NaN or infinite logits")
        if not plain:
            self._sample(logits, tokens, np.arange(len(tokens)) if kept is None else kept)
        return tokens, exits

    def _decide_early(self) -> None:
        """Ask a policy that needs no logits, and want those of the rows whose tokens count alone."""
        scheduler = self._scheduler
        asked, n = scheduler.n_early, scheduler.n_wanted
        if asked == 0:
            return
        assert self._policy is not None
        exits = self._decide(self._policy, None, None)
        if 1 in exits.tolist():
            kept = np.concatenate([np.flatnonzero(exits), np.arange(asked, n)])
            self._batch.want_some(kept)
        else:
            kept = np.arange(asked, n) if asked < n else _NOTHING
            self._batch.want(asked, n)
        self._early = exits, kept

    def _decide(self, policy: ExitPolicy, logits: torch.Tensor | None, top: Array | None) -> Array:
        """Whether each wanted row exits; the policy is asked about those whose tokens are not final
        anyway, which come first.

        Requests that make it raise fail, and they alone.
        """
        asked, n = self._scheduler.n_early, self._scheduler.n_wanted
        try:
            decided = policy.decide(self._rows(logits, top, 0, asked))
            if asked == n:
                return decided
            exits = np.zeros(n, dtype=np.uint8)
            exits[:asked] = decided
        except Exception:  # one of them made it fail: find out which
            exits = np.zeros(n, dtype=np.uint8)
            for i in range(asked):
                try:
                    exits[i] = policy.decide(self._rows(logits, top, i, i + 1))[0]
                except Exception as error:
                    what = f"the exit policy raised {type(error).__name__}: {error}"
                    self._fail(int(self._ids[i]), what)
        return exits

    def _rows(
        self, logits: torch.Tensor | None, top: Array | None, start: int, stop: int
    ) -> ExitRows:
        """The wanted rows ``start`` up to ``stop``, as a policy sees them."""
        views = self._views.get((start, stop))
        if views is None:
            views = [column[start:stop] for column in self._columns]
            self._views[start, stop] = views
        loops, positions, arena, ids = views
        if logits is not None and stop - start < len(logits):
            logits = logits[start:stop]
        return ExitRows(
            logits=_NONE if logits is None else logits,
            top=_NOTHING if top is None else top[start:stop],
            loops=loops,
            positions=positions,
            requests=ids,
            arena=arena,
            hidden=lambda: self._runner.hidden(torch.from_numpy(arena)),
            thresholds=self._own_thresholds(ids) if self.thresholds else None,
        )

    def _own_thresholds(self, ids: Array) -> Array:
        return np.array([self.thresholds.get(i, np.nan) for i in ids.tolist()])

    def _sample(self, logits: torch.Tensor, tokens: Array, kept: Array) -> None:
        """Replace the tokens of rows that ask for more, and keep the log probabilities.

        Row i of ``logits`` is the launch's wanted row ``kept[i]``.
        """
        live = [self._live[i] for i in self._ids[kept].tolist()]
        sound = (tokens[kept] >= 0).tolist()
        special = [i for i, request in enumerate(live) if sound[i] and not request.plain]
        if not special:
            return
        try:
            self._sample_rows(logits, tokens, kept, special, live)
        except Exception:  # one of them made it fail: find out which
            for i in special:
                try:
                    self._sample_rows(logits, tokens, kept, [i], live)
                except Exception as error:
                    what = f"sampling failed: {type(error).__name__}: {error}"
                    self._fail(live[i].handle.request_id, what)

    def _sample_rows(
        self,
        logits: torch.Tensor,
        tokens: Array,
        kept: Array,
        indices: Sequence[int],
        live: Sequence[Live],
    ) -> None:
        wanted = kept[indices]
        positions = self._positions[wanted]
        chosen = sampling.sample(
            logits if len(indices) == len(logits) else logits[indices],
            [live[i].row for i in indices],
            positions,
            lambda k: self._scheduler.history(int(wanted[k])),
        )
        tokens[wanted] = chosen
        asked = [k for k, i in enumerate(indices) if live[i].row.params.logprobs is not None]
        if not asked:
            return
        rows = [indices[k] for k in asked]
        counts = [live[i].row.params.logprobs or 0 for i in rows]
        found = sampling.token_logprobs(logits[rows], chosen[asked], counts)
        for k, entry in zip(asked, found, strict=True):
            live[indices[k]].logprobs[int(positions[k])] = entry
