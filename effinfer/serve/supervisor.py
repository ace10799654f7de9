"""Keeps an engine running: makes it, counts what it owes, makes another when it breaks down."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence

from effinfer.engine import (
    Engine,
    EngineClosed,
    Handle,
    QueueFull,
    RequestTooLong,
    SamplingParams,
)
from effinfer.serve.errors import ApiError, bad_field, named_field
from effinfer.serve.settings import ServeSettings

_LOOK_S = 0.05  # how often the engine's health is looked at
_MOST_BACKOFF_S = 60.0


class Supervisor:
    """One engine at a time, and the requests admitted to it.

    Args:
        make_engine: makes an engine; called in a thread, again after each break-down.
        settings: of the server.
    """

    def __init__(self, make_engine: Callable[[], Engine], settings: ServeSettings) -> None:
        self._make_engine = make_engine
        self._settings = settings
        self._speed = 0.0  # tokens a second, as last looked at
        self.engine: Engine | None = None
        self.restarts = 0
        self.rejected = 0
        self.queued_tokens = 0
        self.draining = False
        self.last_error: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine is not None and not self.engine.broken and not self.draining

    def prepare(self) -> None:
        """Make the first engine before ``start``, where what it raises can be told from a server's.

        Raises:
            Exception: what the engine's making raises.
        """
        self.engine = self._make_engine()

    async def start(self) -> None:
        """Make the first engine, if there is none, and watch over it from then on.

        Raises:
            Exception: what the first engine's making raises; a server without one is of no use.
        """
        if self.engine is None:
            self.engine = await asyncio.to_thread(self._make_engine)
        self.engine.run_in_thread()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Let admitted requests end, for as long as the settings say; then cancel what is left and
        close the engine. Called again, waits for that."""
        self.draining = True
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        engine = self.engine
        if engine is None:
            return
        if not engine.broken:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(engine.adrain(), self._settings.drain_s)
        await engine.aclose()

    def check_open(self) -> Engine:
        """The engine that takes requests.

        Raises:
            ApiError: 503 while there is none.
        """
        engine = self.engine
        if engine is None or engine.broken or self.draining:
            why = "the server is stopping" if self.draining else "the engine is being restarted"
            raise ApiError(503, why, retry_after_s=1)
        return engine

    def refusal(self) -> ApiError | None:
        """Why no request would be taken now, whatever it asks for; None while some would."""
        try:
            engine = self.check_open()
        except ApiError as error:
            return error
        if engine.full:
            return self._overloaded("as many requests wait as may wait")
        if self.queued_tokens >= self._settings.max_queued_tokens:
            return self._overloaded(f"{self.queued_tokens} tokens are queued")
        return None

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens can follow a prompt; 1 after one that is too long, which is refused."""
        return max(1, self.check_open().limits.total - len(prompt))

    def submit(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        deadline_s: float,
        priority: int,
        field: str,
    ) -> list[Handle]:
        """Admit the choices of one request, all or none.

        Args:
            prompts, params: of each choice.
            field: of the request, that the prompts came from.

        Raises:
            ApiError: 400 for what can never run, 429 with Retry-After when the queue is full, 503
                while there is no engine.
        """
        engine = self.check_open()
        pairs = list(zip(prompts, params, strict=True))
        for ids, one in pairs:
            _check(engine, ids, one, field)
        wanted = sum(len(ids) + one.max_tokens for ids, one in pairs)
        most = self._settings.max_queued_tokens
        if self.queued_tokens + wanted > most:
            raise self._overloaded(
                f"{self.queued_tokens} tokens are queued, {wanted} more would be over {most}"
            )
        handles: list[Handle] = []
        try:
            for ids, one in pairs:
                handles.append(engine.submit(ids, one, deadline=deadline_s, priority=priority))
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, QueueFull):
                raise self._overloaded(str(error)) from error
            if isinstance(error, EngineClosed):
                raise ApiError(503, str(error), retry_after_s=1) from error
            raise
        self.queued_tokens += wanted
        return handles

    def release(self, handles: Sequence[Handle]) -> None:
        """The client's side of these has ended: cancel what still runs, and forget them."""
        for handle in handles:
            handle.cancel()
            self.queued_tokens -= len(handle.prompt) + handle.params.max_tokens

    def _overloaded(self, why: str) -> ApiError:
        self.rejected += 1
        wait = self.queued_tokens / self._speed if self._speed > 0 else 1.0
        return ApiError(429, why, retry_after_s=max(1, min(60, math.ceil(wait / 2))))

    async def _watch(self) -> None:
        failures = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.engine is not None and not self.engine.broken:
                stats = self.engine.stats()
                self._speed = stats["tokens_per_second"]
                if stats["tokens"] > 0:
                    failures = 0  # it works
                continue
            await asyncio.sleep(backoff_s(self._settings.restart_backoff_s, failures))
            failures += 1
            await self._restart()

    async def _restart(self) -> None:
        broken, self.engine = self.engine, None
        try:
            if broken is not None:
                await broken.aclose()
            self.engine = await asyncio.to_thread(self._make_engine)
        except Exception as error:  # tried again after a longer wait
            self.last_error = f"{type(error).__name__}: {error}"
            return
        self.engine.run_in_thread()
        self.restarts += 1


def backoff_s(first: float, failures: int) -> float:
    """Seconds to wait before a restart, after so many that did not last."""
    return min(first * 2.0 ** min(failures, 64), _MOST_BACKOFF_S)


def _check(engine: Engine, ids: list[int], params: SamplingParams, field: str) -> None:
    """Raises a 400 that names the field for what the engine can never run."""
    try:
        engine.limits.prompt(ids)
    except (ValueError, TypeError) as error:
        raise bad_field(field, str(error).removeprefix("submit: ")) from error
    try:
        engine.limits.check(ids, params)
    except RequestTooLong as error:
        message = str(error).removeprefix("submit: ")
        raise bad_field(field, message, "context_length_exceeded") from error
    except ValueError as error:
        raise named_field(error) from error
