"""What the engine's one running thread does: a step at a time, from inbox to delivered tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from effinfer.engine.batch import Batch
from effinfer.engine.choose import Chooser, Live
from effinfer.engine.handle import Handle, Wakeups
from effinfer.engine.isolation import launch_one_by_one, lines_of
from effinfer.engine.setup import Parts
from effinfer.engine.stats import EngineStats
from effinfer.engine.submission import loop_bounds

# Kinds of events: a token that is certain, and the five ends.
_TOKEN, _LENGTH, _STOP, _CANCELLED, _DEADLINE, _ERROR = range(6)
_REASONS = ("", "length", "stop", "cancelled", "deadline", "error")
_FRUITLESS = 3  # launches in a row of one request that raise: more than a bad request
_NO_TOKENS = np.zeros(0, dtype=np.int32)


class Core:
    """Drives a scheduler and a runner. Not thread-safe: one thread at a time.

    Args:
        parts: what it drives.
        stats: to count in.

    Attributes:
        live: by id, the requests that have not ended.
    """

    def __init__(self, parts: Parts, stats: EngineStats) -> None:
        self.live: dict[int, Live] = {}
        self._scheduler = parts.scheduler
        self._runner = parts.runner
        self._events = parts.scheduler.events
        self._batch = Batch(parts.scheduler)
        self._fruitless = 0  # launches in a row in which every request failed
        self._special = 0  # live requests that ask for more than the most probable token
        self._chooser = Chooser(parts, self._batch, self.live, self._fail)
        self._stats = stats

    def admit(self, request: Live, priority: int, deadline: float) -> None:
        """Queue a request with the scheduler; ``deadline`` in ``time.monotonic()``'s seconds."""
        handle = request.handle
        self.live[handle.request_id] = request
        self._special += not request.plain
        if handle.params.exit_threshold is not None:
            self._chooser.thresholds[handle.request_id] = handle.params.exit_threshold
        self._scheduler.submit(
            handle.request_id,
            np.array(handle.prompt, dtype=np.int32),
            handle.params.max_tokens,
            list(handle.stop_ids),
            priority,
            deadline,
            *loop_bounds(handle.params, self._runner.spec.loops),
        )

    def cancel(self, request_id: int) -> None:
        """End a request before the next launch; nothing when it has ended."""
        self._scheduler.cancel(request_id)

    def step(self) -> bool:
        """One launch; False when there was nothing to do."""
        scheduler = self._scheduler
        started = time.monotonic()
        rows: int = scheduler.plan(started)
        ended: int = scheduler.n_events
        if ended:
            self._deliver(ended)
        if rows == 0:
            return ended > 0
        wanted = scheduler.n_wanted
        self._batch.resize(rows, scheduler.n_segments, wanted, scheduler.n_fresh)
        begun = time.monotonic()
        try:
            logits = self._runner.launch(self._batch)
            self._fruitless = 0
        except Exception as error:
            logits = self._relaunch(error)
        ran = time.monotonic()
        tokens, exits = _NO_TOKENS, None
        if wanted:
            tokens, exits = self._chooser.choose(logits, plain=self._special == 0)
        chose = time.monotonic()
        events = scheduler.commit(tokens, exits, chose)
        if scheduler.n_propagations:
            self._runner.propagate(scheduler.propagations[: scheduler.n_propagations])
        if events:
            self._deliver(events)
        self._stats.launched(rows, ran - begun, chose - ran, time.monotonic() - started)
        return True

    def slots(self) -> list[dict[str, Any]]:
        """What the running requests are at; from any thread."""
        ids = self._scheduler.request_ids.tolist()
        lines = zip(ids, self._scheduler.line_loops(), strict=True)
        running = [(self.live.get(request_id), loops) for request_id, loops in lines]
        return [_slot(request.handle, loops) for request, loops in running if request is not None]

    def end_all(self, reason: str, error: str | None = None) -> None:
        """Tell every live request's owner that it has ended."""
        requests = list(self.live.values())
        self.live.clear()
        for request in requests:
            request.handle.end(reason, error)
            self._stats.finished[reason] += 1
        wake(request.handle for request in requests)

    def abandon(self) -> None:
        """Leave a step that an interrupt cut off anywhere: the scheduler lets go of every request;
        their owners are still to be told, by ``end_all``."""
        scheduler, now = self._scheduler, time.monotonic()
        for request_id in self.live:
            scheduler.cancel(request_id)
        if scheduler.in_flight:
            scheduler.commit(np.zeros(scheduler.n_wanted, dtype=np.int32), None, now)
        scheduler.plan(now)  # no rows: it ends those that were not in the launch
        self._special = 0

    def _relaunch(self, error: Exception) -> torch.Tensor | None:
        """The logits of a launch that raised ``error``, without the requests that make it raise.

        Raises:
            Exception: ``error``, when it is not theirs but the engine's: nothing works.
        """
        logits, failed = launch_one_by_one(self._runner, self._batch, self._tokens_on)
        requests = len(lines_of(self._batch))
        self._fruitless = self._fruitless + 1 if len(failed) == requests else 0
        if self._fruitless and (requests > 1 or self._fruitless == _FRUITLESS):
            raise error
        for line, own in failed.items():
            what = f"the model raised {type(own).__name__}: {own}"
            self._fail(int(self._scheduler.request_ids[line]), what)
        return logits if len(logits) else None

    def _tokens_on(self, line: int) -> list[int]:
        """The tokens that are certain of the request on a line of the block table."""
        handle = self.live[int(self._scheduler.request_ids[line])].handle
        return [*handle.prompt, *handle.tokens]

    def _fail(self, request_id: int, what: str) -> None:
        """End one request as "error", whatever the others do."""
        self.live[request_id].error = what
        self._scheduler.fail(request_id)

    def _deliver(self, count: int) -> None:
        """Hand the scheduler's events on, and wake who waits for them."""
        waited: list[Handle] = []
        live = self.live
        for request_id, token, depth, kind in self._events[:count].tolist():
            request = live[request_id]
            if kind == _TOKEN and not request.watched:  # nearly always
                if request.handle.put(token, depth):
                    waited.append(request.handle)
            elif kind != _TOKEN:
                self._finish(request, token, depth, kind)
                waited.append(request.handle)
            elif not request.stopped and self._put_watched(request, token, depth):
                waited.append(request.handle)
        if waited:
            wake(waited)

    def _put_watched(self, request: Live, token: int, depth: int) -> int:
        """A token of a request with log probabilities or stop strings; gives how many wait for it."""
        handle = request.handle
        if handle.logprobs is not None:
            position = len(handle.prompt) + len(handle.tokens) - 1
            handle.logprobs.append(request.logprobs.pop(position))
        waits = handle.put(token, depth)
        if request.text is not None:
            try:
                request.text.push(token)
            except Exception as error:  # of the tokenizer
                self._fail(handle.request_id, f"decoding failed: {type(error).__name__}: {error}")
            if request.text.stopped:
                request.stopped = True
                self._scheduler.finish(handle.request_id)
        return waits

    def _finish(self, request: Live, token: int, depth: int, kind: int) -> None:
        handle = request.handle
        if kind == _STOP and token >= 0 and not request.stopped:
            self._put_watched(request, token, depth)  # the stop token comes with the end
        reason = "stop" if request.stopped else "error" if request.error else _REASONS[kind]
        handle.end(reason, request.error)
        del self.live[handle.request_id]
        self._special -= not request.plain
        self._chooser.thresholds.pop(handle.request_id, None)
        self._stats.tokens += len(handle.tokens)
        self._stats.finished[reason] += 1


def _slot(handle: Handle, loops: int) -> dict[str, Any]:
    tokens = len(handle.tokens)
    return {
        "request": handle.request_id,
        "kind": "decode" if tokens else "prefill",
        "prompt_tokens": len(handle.prompt),
        "tokens": tokens,
        "max_tokens": handle.params.max_tokens,
        "depth": handle.depths[tokens - 1] if tokens else 0,
        "loops": [loop for loop in range(loops.bit_length()) if loops >> loop & 1],
    }


def wake(handles: Iterable[Handle]) -> None:
    """Wake who waits for these handles: threads at once, each event loop by one call."""
    wakeups: Wakeups = {}
    for handle in handles:
        handle.wake(wakeups)
    for loop, futures in wakeups.items():
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits there
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
