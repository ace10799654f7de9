"""A request as its owner sees it: a stream of tokens, then an output."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from effinfer.engine.params import SamplingParams
from effinfer.engine.sampling import TokenLogprobs
from effinfer.engine.text import TextStream

FINISH_REASONS = ("stop", "length", "cancelled", "deadline", "error")
Wakeups = dict[asyncio.AbstractEventLoop, list["asyncio.Future[None]"]]


@dataclass(frozen=True)
class Timings:
    """Seconds from a request's submission: to its first token (None without one), and to its end."""

    first_token: float | None
    total: float


@dataclass(frozen=True)
class Output:
    """What became of a request.

    Attributes:
        request_id: the engine's number for it.
        prompt_tokens: length of the prompt.
        tokens: generated; a stop token that ended them is the last.
        text: of the tokens, without special tokens, a stop token, or a stop string and what follows;
            None when the engine has no tokenizer.
        finish_reason: "stop", "length", "cancelled", "deadline" or "error".
        logprobs: for each token, when asked for.
        depths: loops that each token ran.
        timings: seconds.
        error: what went wrong, when finish_reason is "error".
    """

    request_id: int
    prompt_tokens: int
    tokens: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[TokenLogprobs] | None
    depths: list[int]
    timings: Timings
    error: str | None = None


class Owner(Protocol):
    """What a handle needs of its engine."""

    tokenizer: Any

    def drive(self) -> bool:
        """Do a step in this thread; False when the engine's own thread does them."""

    def run_in_thread(self) -> None:
        """See that the engine's own thread runs."""

    def cancel(self, handle: Handle) -> None:
        """End the request soon."""


class Handle:
    """A submitted request. Made by ``Engine.submit``.

    Iterating gives its tokens as they come, as often as wanted and from any thread; ``async for``
    too. When no thread runs the engine, waiting for a token runs it.

    Attributes:
        request_id: the engine's number for it.
        prompt: its token ids.
        params: how its tokens are chosen.
        stop_ids: tokens that end it.
        tokens, depths: what has been generated so far, and the loops it took.
        logprobs: of the tokens so far; None when not asked for.
        finish_reason: None until it has ended.
        error: what went wrong, when finish_reason is "error".
    """

    __slots__ = (
        "_at_end",
        "_condition",
        "_first",
        "_futures",
        "_output",
        "_owner",
        "_start",
        "_total",
        "_waiting",
        "depths",
        "error",
        "finish_reason",
        "logprobs",
        "params",
        "prompt",
        "request_id",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        owner: Owner,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        self._owner = owner
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.stop_ids = stop_ids
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._start = time.monotonic()
        self._first: float | None = None
        self._total = 0.0
        self._output: Output | None = None
        self._condition = threading.Condition()
        self._waiting = 0  # threads and futures; written under the condition, read without
        self._futures: list[asyncio.Future[None]] = []
        self._at_end: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        return f"Handle({self.request_id}, {state}, {len(self.tokens)} tokens)"

    def __iter__(self) -> Iterator[int]:
        """The tokens, each as soon as it is there. Raises what stops the engine."""
        at = 0
        while True:
            ended = self.finish_reason is not None  # looked up before the tokens are
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            if ended:
                return
            self._wait(at)

    async def __aiter__(self) -> AsyncIterator[int]:
        """The tokens, each as soon as it is there; starts the engine's thread."""
        at = 0
        while True:
            ended = self.finish_reason is not None
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            if ended:
                return
            await self._changed(at)

    def texts(self) -> Iterator[str]:
        """The text in pieces, as it becomes certain; they add up to the output's text."""
        stream = self._text_stream()
        for token in self:
            if piece := self._pieces(stream, [token]):
                yield piece
        if piece := stream.flush():
            yield piece

    async def atexts(self) -> AsyncIterator[str]:
        """``texts`` for ``async for``; tokens that come faster than they are asked for make one
        piece."""
        stream, at = self._text_stream(), 0
        while True:
            ended = self.finish_reason is not None
            tokens = self.tokens[at:]
            at += len(tokens)
            if piece := self._pieces(stream, tokens):
                yield piece
            if ended:
                break
            await self._changed(at)
        if piece := stream.flush():
            yield piece

    def result(self, timeout: float | None = None) -> Output:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; it runs on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.finish_reason is None:
            self._wait(None, until)
        return self._finished()

    @property
    def timings(self) -> Timings:
        """Its seconds, once it has ended."""
        return Timings(self._first, self._total)

    async def aresult(self) -> Output:
        """``result`` for ``await``; starts the engine's thread. Cancelling the await does not
        cancel the request."""
        while self.finish_reason is None:
            await self._changed(None)
        return self._finished()

    def cancel(self) -> None:
        """End the request before the next launch, as "cancelled"; nothing when it has ended."""
        if self.finish_reason is None:
            self._owner.cancel(self)

    # What the engine calls, in the thread that runs it.

    def put(self, token: int, depth: int) -> int:
        """One more token; gives how many wait for it."""
        if self._first is None:
            self._first = time.monotonic() - self._start
        self.depths.append(depth)
        self.tokens.append(token)
        return self._waiting

    def end(self, reason: str, error: str | None = None) -> None:
        """No more tokens."""
        self._total = time.monotonic() - self._start
        self.error = error
        self.finish_reason = reason

    def wake(self, wakeups: Wakeups) -> None:
        """Wake threads that wait; add futures that do to ``wakeups``, for their loops."""
        with self._condition:
            self._waiting -= len(self._futures)
            woken, self._futures = self._futures, []
            if self.finish_reason is not None:
                woken, self._at_end = woken + self._at_end, []
            for future in woken:
                wakeups.setdefault(future.get_loop(), []).append(future)
            self._condition.notify_all()

    # Waiting.

    def _ready(self, at: int | None) -> bool:
        return self.finish_reason is not None or (at is not None and len(self.tokens) > at)

    def _wait(self, at: int | None, until: float | None = None) -> None:
        """Until there is a token number ``at``, or the end."""
        while not self._ready(at):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"request {self.request_id} has not ended yet")
            if self._owner.drive():
                continue
            with self._condition:
                # Counted before it looks again: the engine adds a token before it reads the count.
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: self._ready(at), left)
                finally:
                    self._waiting -= 1

    async def _changed(self, at: int | None) -> None:
        self._owner.run_in_thread()
        future = asyncio.get_running_loop().create_future()
        with self._condition:
            if at is None:  # for the end alone, which wakes everyone: no token need count it
                self._at_end.append(future)
            else:
                self._futures.append(future)
                self._waiting += 1
        if not self._ready(at):
            await future

    def _finished(self) -> Output:
        if self._output is None:
            assert self.finish_reason is not None
            text = None
            if self._owner.tokenizer is not None:
                stream = self._text_stream()
                text = self._pieces(stream, self.tokens) + stream.flush()
            self._output = Output(
                request_id=self.request_id,
                prompt_tokens=len(self.prompt),
                tokens=self.tokens,
                text=text,
                finish_reason=self.finish_reason,
                logprobs=self.logprobs,
                depths=self.depths,
                timings=self.timings,
                error=self.error,
            )
        return self._output

    def _text_stream(self) -> TextStream:
        if self._owner.tokenizer is None:
            raise ValueError("Handle: text needs an engine with a tokenizer")
        return TextStream(self._owner.tokenizer, tuple(self.params.stop), self.params.min_tokens)

    def _pieces(self, stream: TextStream, tokens: list[int]) -> str:
        return stream.push_all([token for token in tokens if token not in self.stop_ids])
