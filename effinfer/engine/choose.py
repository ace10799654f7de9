"""From a launch's logits to tokens and exits, each request on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from effinfer.engine import sampling
from effinfer.engine.handle import Handle
from effinfer.engine.policies import ExitPolicy, ExitRows
from effinfer.engine.runner import Runner
from effinfer.engine.sampling import RowParams, TokenLogprobs
from effinfer.engine.text import TextStream

Array = np.ndarray[Any, Any]


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
        scheduler: whose launch's rows are chosen from.
        runner: for hidden states.
        policy: None where no row may exit.
        live: the engine's requests by id.
        fail: called with a request id and what is wrong with it.
    """

    def __init__(
        self,
        scheduler: Any,
        runner: Runner,
        policy: ExitPolicy | None,
        live: dict[int, Live],
        fail: Callable[[int, str], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._policy = policy
        self._live = live
        self._fail = fail
        self._positions, self._loops = scheduler.positions, scheduler.loops
        self._arena = scheduler.arena
        self._wanted, self._ids = scheduler.wanted, scheduler.wanted_ids

    def choose(self, logits: torch.Tensor, plain: bool) -> tuple[Array, Array | None]:
        """A token ``(n,)`` int32 and whether it may be taken early ``(n,)`` uint8, for every row.

        Args:
            logits: ``(n, vocab)`` float32 of the n wanted rows.
            plain: no live request asks for more than its most probable token.
        """
        top, sound = sampling.greedy(logits)
        tokens = top.astype(np.int32)
        n = len(tokens)
        if not sound.all():
            for request_id in self._ids[:n][~sound].tolist():
                self._fail(request_id, "the model gave NaN or infinite logits")
        if not plain:
            self._sample(logits, tokens, sound)
        return tokens, None if self._policy is None else self._exits(logits, top)

    def _exits(self, logits: torch.Tensor, top: Array) -> Array:
        assert self._policy is not None
        n = len(top)
        rows = self._wanted[:n, 0]
        arena = self._arena[rows]
        return self._policy.decide(
            ExitRows(
                logits=logits,
                top=top,
                loops=self._loops[rows],
                positions=self._positions[rows],
                requests=self._ids[:n],
                arena=arena,
                hidden=lambda: self._runner.hidden(torch.from_numpy(arena)),
            )
        )

    def _sample(self, logits: torch.Tensor, tokens: Array, sound: Array) -> None:
        """Replace the tokens of rows that ask for more, and keep the log probabilities."""
        live = [self._live[i] for i in self._ids[: len(tokens)].tolist()]
        special = [i for i, request in enumerate(live) if sound[i] and not request.plain]
        if not special:
            return
        positions = self._positions[self._wanted[: len(tokens), 0]]
        try:
            self._sample_rows(logits, tokens, special, live, positions)
        except Exception:  # one of them made it fail: find out which
            for i in special:
                try:
                    self._sample_rows(logits, tokens, [i], live, positions)
                except Exception as error:
                    what = f"sampling failed: {type(error).__name__}: {error}"
                    self._fail(live[i].handle.request_id, what)

    def _sample_rows(
        self,
        logits: torch.Tensor,
        tokens: Array,
        indices: Sequence[int],
        live: Sequence[Live],
        positions: Array,
    ) -> None:
        whole = len(indices) == len(tokens)
        chosen = sampling.sample(
            logits if whole else logits[indices],
            [live[i].row for i in indices],
            positions[indices],
            lambda k: self._scheduler.history(indices[k]),
        )
        tokens[indices] = chosen
        asked = [i for i in indices if live[i].row.params.logprobs is not None]
        if not asked:
            return
        counts = [live[i].row.params.logprobs or 0 for i in asked]
        found = sampling.token_logprobs(logits[asked], tokens[asked], counts)
        for i, entry in zip(asked, found, strict=True):
            live[i].logprobs[int(positions[i])] = entry
