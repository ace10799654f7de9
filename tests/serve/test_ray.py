"""Replicas by Ray Serve: one that dies takes no other's requests with it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.running import PATIENCE_S, completion, events_of, wait_until

pytest.importorskip("ray", reason="ray is not installed")

import ray
from ray import serve

from effinfer.serve import ServeSettings
from effinfer.serve import ray as replicas

ROOT = Path(__file__).parents[2]
SLOTS = 6
LOOK_S = 0.2  # between looks, which take their time from the replicas
SETTINGS = ServeSettings(model_name="toy", drain_s=30)


def builder(version, hold):
    """Makes an application whose answers tell which process and version gave them; its model stands
    still while there is a file ``hold``."""

    def build():
        from effinfer.serve import create_app
        from tests.engine.toy import Letters
        from tests.serve.running import Gate, toy_engine

        class FileGate(Gate):
            def pass_through(self):
                wait_until(lambda: not hold.exists(), "it may go on")

        app = create_app(
            lambda: toy_engine(FileGate(), max_slots=SLOTS, max_queue=2 * SLOTS),
            Letters(),
            SETTINGS,
        )

        @app.middleware("http")
        async def name_yourself(request, go_on):
            answer = await go_on(request)
            answer.headers["x-process"] = str(os.getpid())
            answer.headers["x-version"] = version
            return answer

        return app

    return build


def deploy(version, hold):
    replicas.deploy(
        replicas.application(
            builder(version, hold), SETTINGS, max_slots=SLOTS, max_queue=2 * SLOTS, replicas=1,
            max_replicas=2, react_s=0.5, cpus=0,
        )
    )  # fmt: skip


@pytest.fixture
def cluster(unused_port, tmp_path, monkeypatch):
    """A server by Ray: its URL, and the file that holds its models still."""
    for who in ("HANDLE", "REPLICA"):  # how often they say how many requests they have
        monkeypatch.setenv(f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.2")
    hold = tmp_path / "hold"
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    replicas.start("127.0.0.1", unused_port, num_cpus=2, runtime_env=environment)
    deploy("1", hold)
    yield f"http://127.0.0.1:{unused_port}", hold
    serve.shutdown()
    ray.shutdown()


def processes(url):
    """Those that answer."""
    answers = [httpx.get(url + "/health", timeout=PATIENCE_S) for _ in range(8)]
    return {int(a.headers["x-process"]) for a in answers if a.status_code == 200}


def running():
    """Replicas that take requests. Ray gives those to the less busy: asking would find that one."""
    [deployment] = serve.status().applications[replicas.NAME].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def complete(url):
    body = completion(max_tokens=2)
    return httpx.post(url + "/v1/completions", json=body, timeout=PATIENCE_S)


def stream(url, begun):
    """The process that streamed, and whether it got to the end."""
    lines = []
    body = completion(stream=True)
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        process = int(answer.headers["x-process"])
        begun.append(process)
        try:
            lines += answer.iter_lines()
        except httpx.TransportError:
            return process, False
    whole = bool(lines) and lines[-2:] == ["data: [DONE]", ""]
    return process, whole and "error" not in events_of(lines)[-1]


def streams_that_wait(url, pool, hold, count):
    """Streams that have begun and can't go on before ``hold`` is gone, and their processes."""
    hold.touch()
    begun = []
    streams = [pool.submit(stream, url, begun) for _ in range(count)]
    wait_until(lambda: len(begun) == count, "all stream")
    return streams, begun


def test_replicas_grow_die_and_are_replaced(cluster, pool):
    """One test, for to start a cluster and its replicas is most of the work."""
    url, hold = cluster

    # More requests than slots: another replica.
    streams, begun = streams_that_wait(url, pool, hold, 2 * SLOTS)
    assert len(set(begun)) == 1
    wait_until(lambda: running() == 2, "there are two replicas", LOOK_S)
    hold.unlink()
    assert all(whole for _, whole in (one.result() for one in streams))

    # One is killed under load: its own requests fail, and no other's.
    streams, begun = streams_that_wait(url, pool, hold, 2 * SLOTS)
    killed = begun[0]
    assert set(begun) != {killed}
    os.kill(killed, signal.SIGKILL)
    hold.unlink()
    assert all(whole == (process != killed) for process, whole in (s.result() for s in streams))
    wait_until(lambda: len(processes(url) - {killed}) == 2, "another takes its place", LOOK_S)

    # A new version: what runs goes on to its end, and what comes is answered.
    streams, _ = streams_that_wait(url, pool, hold, 4)
    update = pool.submit(deploy, "2", hold)
    hold.unlink()
    while not update.done():
        assert complete(url).status_code == 200
        time.sleep(LOOK_S)
    update.result()
    assert all(whole for _, whole in (one.result() for one in streams))
    assert complete(url).headers["x-version"] == "2"
