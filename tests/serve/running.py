"""A real server on a real port, over a model that the tests know by heart and can hold still."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx

from effinfer.engine import Engine
from effinfer.serve import ServeSettings, create_app
from effinfer.serve.run import Server
from tests.engine.toy import Letters, ToyRunner

PATIENCE_S = 120  # bounds tests that hang; no test depends on how long anything takes


def wait_until(what, why, every_s=0.005):
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s until {why}"
        time.sleep(every_s)


class Gate:
    """Lets launches through, all or so many."""

    def __init__(self):
        self._condition = threading.Condition()
        self._permits = float("inf")

    def hold(self):
        self._set(0)

    def open(self):
        self._set(float("inf"))

    def allow(self, launches):
        self._set(launches)

    def _set(self, permits):
        with self._condition:
            self._permits = permits
            self._condition.notify_all()

    def pass_through(self):
        with self._condition:
            assert self._condition.wait_for(lambda: self._permits > 0, PATIENCE_S)
            self._permits -= 1


class GatedToy(ToyRunner):
    """Launches when its gate says so."""

    def __init__(self, gate, **options):
        super().__init__(max_positions=4096, **options)
        self.gate = gate
        self.launches = 0

    def launch(self, batch):
        self.launches += 1
        self.gate.pass_through()
        return super().launch(batch)


def toy_engine(gate, *, loops=1, max_slots=4, max_queue=8, mode="full", policy=None):
    """An engine over the toy model."""
    return Engine(
        GatedToy(gate, loops=loops), Letters(), max_slots=max_slots, max_queue=max_queue,
        memory_bytes=1 << 20, token_budget=64, costs=[1.0] * 64, mode=mode, policy=policy,
    )  # fmt: skip


class RunningServer:
    """An application served in a thread: its URL, and a client."""

    def __init__(self, app, settings):
        self.supervisor = app.state.supervisor
        self.model = settings.model_name
        self.uvicorn = Server(app, settings, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.uvicorn.started, "the server starts")
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def complete(self, prompt="ABC", **fields):
        body = completion(prompt, model=self.model, **fields)
        return self.client.post("/v1/completions", json=body)

    @contextlib.contextmanager
    def stream(self, prompt="ABC", **fields):
        body = completion(prompt, model=self.model, stream=True, **fields)
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            yield answer


class ToyServer(RunningServer):
    """One over the toy model: also the gate of its launches, and the runners it has made."""

    ENGINE = ("loops", "max_slots", "max_queue", "mode", "policy")

    def __init__(self, *, tokenizer=None, **options):
        engine_options = {name: options.pop(name) for name in self.ENGINE if name in options}
        self.gate = Gate()
        self.makes_engines = threading.Event()  # cleared: the next engine takes until it is set
        self.makes_engines.set()
        self.runners = []

        def make_engine():
            assert self.makes_engines.wait(PATIENCE_S)
            engine = toy_engine(self.gate, **engine_options)
            self.runners.append(engine.runner)
            return engine

        settings = ServeSettings(
            **{"model_name": "toy", "restart_backoff_s": 0.01, "drain_s": 20, **options}
        )
        super().__init__(create_app(make_engine, tokenizer or Letters(), settings), settings)

    def __exit__(self, *error):
        self.gate.open()
        self.makes_engines.set()
        super().__exit__(*error)

    @property
    def stats(self):
        return self.supervisor.engine.stats()

    def connect(self, prompt="ABC", **fields):
        """A connection with a request on it, by hand: clients that misbehave need one."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = json.dumps(completion(prompt, **fields)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        return connection

    def wait_for(self, **counts):
        """Until the engine's counts of these names are these."""
        wait_until(
            lambda: all(self.stats[name] == count for name, count in counts.items()),
            f"counts are {counts}",
        )

    def wait_until_there(self, requests):
        """Until the engine has so many, whether they already run or still wait: those that come
        before its next step begin together."""
        wait_until(
            lambda: self.stats["running"] + self.stats["waiting"] == requests,
            f"{requests} requests are there",
        )

    def wait_idle(self):
        """Until nothing runs, waits or is owed, and every block is free."""

        def idle():
            stats = self.stats
            return (
                stats["running"] == stats["waiting"] == self.supervisor.queued_tokens == 0
                and stats["free_blocks"] + stats["idle_blocks"]
                == self.supervisor.engine.pools.blocks
            )

        wait_until(idle, "the server is idle")


def completion(prompt="ABC", **fields):
    """A greedy request's body."""
    return {"model": "toy", "temperature": 0, **fields, "prompt": prompt}


def events_of(lines):
    """What a stream's lines say, without the [DONE] that must end it."""
    told = [line.removeprefix("data: ") for line in lines if line]
    assert told[-1] == "[DONE]"
    return [json.loads(line) for line in told[:-1]]
