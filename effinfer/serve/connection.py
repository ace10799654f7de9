"""What a client's connection does to its request: bodies too large or too slow, gone clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from effinfer.serve.errors import ApiError


class BodyLimit:
    """Reads bodies: 413 over ``limit`` bytes, declared or not; 408 when not there in ``seconds``.

    ``refusal`` tells whether, and why, one that is there is not looked at: under overload most are
    not, and what it costs to say so is taken from the requests that run.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        seconds: float,
        refusal: Callable[[Scope], ApiError | None],
    ) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not come in {self._seconds:g} seconds")
            return await error.response()(scope, receive, send)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is None:
            return None
        if refused := self._refusal(scope):
            return await refused.response()(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        return await self._app(scope, read, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None when the client has gone."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._limit:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is over {self._limit} bytes")


async def unless_gone(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of ``work``, or None as soon as the client has gone; then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()


class EventStream(Response):
    """Server-sent events from ``events``, each a JSON value, then ``[DONE]``.

    ``at_end`` is called once, when the last event is written or the client has gone.
    """

    def __init__(self, events: AsyncGenerator[Any, None], at_end: Callable[[], None]) -> None:
        super().__init__()
        self._events = events
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await unless_gone(request, asyncio.ensure_future(self._write(send)))
        finally:
            self._at_end()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: str, more: bool = True) -> None:
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async with aclosing(self._events) as events:
            async for event in events:
                await write(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        await write("[DONE]", more=False)
