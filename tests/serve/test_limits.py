"""What a server refuses, and what it does to clients that go away or do not read."""

from __future__ import annotations

import itertools
import socket
import time
from types import SimpleNamespace

import pytest

from effinfer.engine import core
from tests.serve.running import completion, wait_until


def test_full_queue_is_429_with_retry_after(make_server, pool):
    server = make_server(max_slots=1, max_queue=2)
    server.gate.hold()
    admitted = [pool.submit(server.complete, max_tokens=4)]
    server.wait_for(running=1)
    admitted += [pool.submit(server.complete, max_tokens=4) for _ in range(2)]
    server.wait_for(waiting=2)
    refused = server.complete(max_tokens=4)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.supervisor.rejected == 1
    unread = server.client.post("/v1/completions", content=b"{")  # what it holds is not looked at
    assert unread.status_code == 429
    assert server.supervisor.rejected == 2
    server.gate.open()
    assert [answer.result().status_code for answer in admitted] == [200] * 3
    server.wait_idle()


def test_queued_tokens_are_bounded(make_server, pool):
    server = make_server(max_queued_tokens=100)
    server.gate.hold()
    first = pool.submit(server.complete, max_tokens=80)
    wait_until(lambda: server.supervisor.queued_tokens == 83, "the first is admitted")
    refused = server.complete(max_tokens=80)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    second = pool.submit(server.complete, max_tokens=5)
    wait_until(lambda: server.supervisor.queued_tokens == 91, "there is room for a short one")
    server.gate.open()
    assert first.result().status_code == second.result().status_code == 200
    server.wait_idle()
    assert server.complete(max_tokens=80).status_code == 200


def test_choices_are_admitted_all_or_none(make_server):
    server = make_server(max_slots=1, max_queue=2)
    assert server.complete(n=8, max_tokens=4).status_code == 429
    server.wait_idle()
    assert server.complete(n=3, max_tokens=4).status_code == 200
    assert server.complete(n=65, max_tokens=4).json()["error"]["param"] == "n"


def test_large_bodies_are_413(make_server):
    server = make_server(max_body_bytes=2000)
    assert server.complete("A" * 3000).status_code == 413
    undeclared = server.client.post("/v1/completions", content=itertools.repeat(b" " * 100, 50))
    assert undeclared.status_code == 413
    assert server.complete(max_tokens=3).status_code == 200


def test_bodies_that_never_come_are_408(make_server):
    server = make_server(read_timeout_s=0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_api_key(make_server):
    server = make_server(api_key="s3cret")
    assert server.complete().status_code == 401
    assert server.client.get("/live").status_code == 401
    server.client.headers["authorization"] = "Bearer s3cret"
    assert server.complete().status_code == 200
    server.client.headers["authorization"] = "Bearer s3cre"
    assert server.complete().status_code == 401
    assert server.client.get("/health").status_code == 200


def test_browsers_of_other_origins_are_not_let_in(make_server):
    closed, opened = make_server(), make_server(cors_origins=("https://a.example",))
    for server, allowed in ((closed, None), (opened, "https://a.example")):
        answer = server.client.get("/health", headers={"origin": "https://a.example"})
        assert answer.headers.get("access-control-allow-origin") == allowed


@pytest.mark.parametrize("stream", [False, True])
def test_gone_clients_are_cancelled_within_a_tick(make_server, stream):
    server = make_server()
    server.gate.hold()
    connection = server.connect(max_tokens=4000, stream=stream)
    server.wait_for(running=1)
    connection.close()
    wait_until(lambda: server.supervisor.queued_tokens == 0, "the server knows that it has gone")
    server.gate.open()  # for the launch that was under way
    server.wait_idle()
    assert server.stats["finished"]["cancelled"] == 1
    assert server.runners[0].launches == 1


def test_gone_clients_that_waited_leave_the_others_alone(make_server, pool):
    server = make_server(max_slots=1)
    server.gate.hold()
    first = pool.submit(server.complete, max_tokens=6)
    server.wait_for(running=1)
    second = server.connect("BCD", max_tokens=6)
    server.wait_for(waiting=1)
    second.close()
    wait_until(lambda: server.supervisor.queued_tokens == 9, "the server knows that it has gone")
    server.gate.open()
    answer = first.result()
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    server.wait_idle()
    assert server.stats["finished"] == {
        "stop": 0, "length": 1, "cancelled": 1, "deadline": 0, "error": 0,
    }  # fmt: skip


def test_slow_readers_are_dropped(make_server):
    server = make_server(write_timeout_s=0.1)
    server.gate.hold()
    connection = server.connect(max_tokens=4000, stream=True, logprobs=20)  # and never read
    server.wait_for(running=1)
    (there,) = server.uvicorn.server_state.connections
    here = there.transport.get_extra_info("socket")
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
    server.gate.open()
    wait_until(lambda: server.stats["finished"]["cancelled"] == 1, "it is cancelled")
    wait_until(lambda: not server.uvicorn.server_state.connections, "its connection is cut")
    server.wait_idle()
    connection.close()


def test_deadlines(make_server, pool, monkeypatch):
    ahead = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr(core, "time", clock)
    server = make_server()
    server.gate.hold()
    begun = pool.submit(server.complete, max_tokens=2000, deadline_s=500)
    server.wait_for(running=1)
    server.gate.allow(3)
    wait_until(lambda: server.stats["slots"][0]["tokens"] == 3, "it has tokens")
    ahead = 501.0
    server.gate.open()
    choice = begun.result().json()["choices"][0]
    assert choice["finish_reason"] == "deadline"
    assert 3 <= len(choice["text"]) <= 4
    late = server.complete(max_tokens=5, deadline_s=500)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline"
    server.wait_idle()


def test_server_has_a_deadline_of_its_own(make_server):
    server = make_server(deadline_s=1e-9)
    assert server.client.post("/v1/completions", json=completion()).status_code == 504
