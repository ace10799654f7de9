"""Servers for the tests here."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.running import ToyServer


@pytest.fixture(scope="module")
def server():
    """One that a module's tests share."""
    with ToyServer() as running:
        yield running


@pytest.fixture
def make_server():
    """Servers of one test's own."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(ToyServer(**options))


@pytest.fixture
def pool():
    """Threads for clients that wait."""
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture(scope="module")
def unused_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
