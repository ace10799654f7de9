"""Runs the application: uvicorn, clients that do not read, and a drain that begins with the signal."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from effinfer.serve.settings import ServeSettings
from effinfer.serve.supervisor import Supervisor

# Seconds that a thread keeps Python's lock from another that waits. By default 5 ms: an event loop
# busy with bodies and streams would have the engine wait that long many times in each launch.
_SWITCH_S = 0.0005
_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_LAST_WORDS_S = 5  # for answers to be written after the drain has ended


def _protocol(write_timeout_s: float) -> type[H11Protocol]:
    """HTTP/1.1 that cuts a connection whose client leaves a full buffer unread for that long."""

    class Impatient(H11Protocol):
        _overdue: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._overdue = self.loop.call_later(write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._forgive()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forgive()
            super().connection_lost(exc)

        def _forgive(self) -> None:
            if self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

    return Impatient


class Server(uvicorn.Server):
    """Takes no request from the first signal on, while those it has go on to their ends.

    Args:
        app: made by ``create_app`` with the same ``settings``.
        port: 0 for one that is free.
        announce: called with the URL once requests are taken there.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: ServeSettings,
        host: str,
        port: int,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            http=_protocol(settings.write_timeout_s),
            timeout_graceful_shutdown=int(settings.drain_s) + _LAST_WORDS_S,
        )
        super().__init__(config)
        self._supervisor: Supervisor = app.state.supervisor
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            port = self.servers[0].sockets[0].getsockname()[1]
            self._announce(f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What the signal does: "not ready" at once, then uvicorn's own way to the end."""
        self._supervisor.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and let requests end; those that have not in time are told."""
        stopping = asyncio.create_task(self._supervisor.stop())
        await super().shutdown(sockets)
        await stopping


def _give_back_large_buffers() -> None:
    """Have glibc return memory of this size and more to the system when it is freed. Left alone it
    learns to keep it, and the memory of a server whose engine is replaced would not be flat."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def run(app: FastAPI, settings: ServeSettings, host: str, port: int) -> None:
    """Say where, and serve until SIGTERM or SIGINT; then let what runs end, for ``settings.drain_s``
    seconds.

    Raises:
        SystemExit: the address is taken, or the engine can't be made; uvicorn has said why.
    """
    _give_back_large_buffers()
    sys.setswitchinterval(_SWITCH_S)
    # The libraries and the model stay: a collector that goes through them holds everybody up.
    gc.collect()
    gc.freeze()

    def announce(url: str) -> None:
        print(f"{settings.model_name} at {url}", flush=True)

    server = Server(app, settings, host, port, announce)
    server.run()
    if not server.started:
        raise SystemExit(3)
