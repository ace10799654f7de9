"""Engines that break down, and servers that are told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import httpx

from effinfer.serve.supervisor import backoff_s
from tests.serve.running import completion, events_of, wait_until


def break_down(server):
    """The third request in a row that fails alone breaks the engine down."""
    server.runners[0].explode = True
    for _ in range(3):
        assert server.complete(max_tokens=4).status_code == 500


def test_crash_tells_everyone_and_the_engine_comes_back(make_server, pool):
    server = make_server(max_slots=2)
    server.gate.hold()
    whole = pool.submit(server.complete, max_tokens=2000)
    streamed = pool.submit(server.complete, max_tokens=2000, stream=True)
    server.wait_until_there(2)
    server.gate.allow(1)
    server.wait_for(running=2, waiting=0)
    waits = pool.submit(server.complete, max_tokens=5)
    server.wait_for(waiting=1)
    server.runners[0].explode = True
    server.gate.open()
    for answer in (whole.result(), waits.result()):
        assert answer.status_code == 500
        assert "boom" in answer.json()["error"]["message"]
    last = events_of(streamed.result().text.split("\n\n"))[-1]
    assert "boom" in last["error"]["message"]

    wait_until(lambda: server.supervisor.restarts == 1, "it comes back")
    assert len(server.runners) == 2
    assert server.runners[0].closed
    assert server.client.get("/ready").status_code == 200
    assert server.complete(max_tokens=4).status_code == 200
    server.wait_idle()


def test_not_ready_while_it_restarts(make_server):
    server = make_server()
    server.makes_engines.clear()
    break_down(server)
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 503
    refused = server.complete(max_tokens=4)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert server.client.get("/metrics").status_code == 200
    assert server.client.get("/live").json()["ready"] is False
    server.makes_engines.set()
    wait_until(lambda: server.client.get("/ready").status_code == 200, "it is ready again")


def test_an_engine_that_cannot_be_made_is_tried_again(make_server, monkeypatch):
    server = make_server()
    make, fails = server.supervisor._make_engine, iter([True, True, False])

    def often_not():
        if next(fails):
            raise RuntimeError("no memory")
        return make()

    monkeypatch.setattr(server.supervisor, "_make_engine", often_not)
    break_down(server)
    wait_until(lambda: server.supervisor.restarts == 1, "it comes back")
    assert server.supervisor.last_error == "RuntimeError: no memory"
    assert server.complete(max_tokens=4).status_code == 200


def test_restarts_back_off():
    waits = [backoff_s(0.5, failures) for failures in (0, 1, 2, 3, 10, 10**6)]
    assert waits == [0.5, 1, 2, 4, 60, 60]


def test_what_has_not_ended_after_the_drain_is_told(make_server, pool):
    server = make_server(max_slots=2, drain_s=0.2)
    server.gate.allow(3)
    begun = pool.submit(server.complete, max_tokens=4000)
    server.wait_for(running=1)
    wait_until(lambda: server.stats["slots"][0]["tokens"] == 3, "it has tokens")
    streamed = pool.submit(server.complete, max_tokens=4000, stream=True)
    waits = pool.submit(server.complete, max_tokens=4000, n=2)
    server.wait_for(waiting=3)
    server.uvicorn.should_exit = True
    wait_until(lambda: server.supervisor.engine.broken, "the drain is over")
    server.gate.open()
    assert begun.result().json()["choices"][0]["finish_reason"] == "cancelled"
    last = events_of(streamed.result().text.split("\n\n"))[-1]
    assert last["choices"][0]["finish_reason"] == "cancelled"
    assert waits.result().status_code == 503


PROGRAM = """
import sys, threading
from effinfer.serve import ServeSettings, create_app
from effinfer.serve.run import run
from tests.engine.toy import Letters
from tests.serve.running import Gate, toy_engine
gate = Gate()
gate.hold()
def on_word():
    sys.stdin.readline()
    gate.open()
threading.Thread(target=on_word, daemon=True).start()
settings = ServeSettings(model_name="toy", drain_s=60)
app = create_app(lambda: toy_engine(gate, max_slots=1), Letters(), settings)
run(app, settings, "127.0.0.1", 0)
"""


def test_sigterm_lets_running_and_queued_requests_end(pool):
    program, pipe = [sys.executable, "-c", PROGRAM], subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True) as process:
        name, url = process.stdout.readline().split(" at ")
        assert name == "toy"
        url = url.strip()

        def answers(path="/ready"):
            try:
                return httpx.get(url + path).status_code == 200
            except httpx.TransportError:
                return False

        def counts(name, number):
            return f"vllm:num_requests_{name} {number}.0" in httpx.get(url + "/metrics").text

        def ask(**fields):
            body = completion(max_tokens=9, **fields)
            return httpx.post(url + "/v1/completions", json=body, timeout=60)

        assert answers()  # as soon as it has said where
        runs = pool.submit(ask, stream=True)
        wait_until(lambda: counts("running", 1), "the first runs")
        waits = pool.submit(ask)
        wait_until(lambda: counts("waiting", 1), "the second waits")
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: not answers("/health"), "it listens no more")
        process.stdin.write("go\n")
        process.stdin.flush()
        last = events_of(runs.result().text.split("\n\n"))[-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert json.loads(waits.result().text)["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=60) == -signal.SIGTERM
