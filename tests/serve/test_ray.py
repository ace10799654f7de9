"""Replicas by Ray Serve: one that dies takes no other's requests with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.serve.running import PATIENCE_S, completion, events_of, wait_until

pytest.importorskip("ray.serve", reason="ray is not installed")

from effinfer.serve import ServeSettings
from effinfer.serve import ray as replicas

ROOT = Path(__file__).parents[2]
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

        app = create_app(lambda: toy_engine(FileGate(), max_slots=8), Letters(), SETTINGS)

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
            builder(version, hold), SETTINGS, max_slots=8, max_queue=8, replicas=2, cpus=0
        )
    )


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    return tmp_path_factory.mktemp("ray") / "hold"


@pytest.fixture(scope="module")
def url(unused_port, hold):
    import ray
    from ray import serve

    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    replicas.start("127.0.0.1", unused_port, num_cpus=2, runtime_env=environment)
    deploy("1", hold)
    yield f"http://127.0.0.1:{unused_port}/v1/completions"
    serve.shutdown()
    ray.shutdown()


def ask(url):
    return httpx.post(url, json=completion(max_tokens=2), timeout=PATIENCE_S)


def stream(url, begun):
    """The process that streamed, and whether it got to the end."""
    lines = []
    with httpx.stream("POST", url, json=completion(stream=True), timeout=PATIENCE_S) as answer:
        process = int(answer.headers["x-process"])
        begun.append(process)
        try:
            lines += answer.iter_lines()
        except httpx.TransportError:
            return process, False
    whole = bool(lines) and lines[-2:] == ["data: [DONE]", ""]
    return process, whole and "error" not in events_of(lines)[-1]


def test_a_killed_replica_takes_no_others_requests(url, hold, pool):
    wait_until(lambda: len({ask(url).headers["x-process"] for _ in range(8)}) == 2, "both answer")
    hold.touch()
    begun = []
    streams = [pool.submit(stream, url, begun) for _ in range(12)]
    wait_until(lambda: len(begun) == 12, "all stream")
    killed = begun[0]
    assert set(begun) != {killed}
    os.kill(killed, signal.SIGKILL)
    hold.unlink()
    ended = [one.result() for one in streams]
    assert all(whole == (process != killed) for process, whole in ended)

    def both_answer_again():
        answers = [ask(url) for _ in range(8)]
        found = {a.headers["x-process"] for a in answers if a.status_code == 200}
        return len(found - {str(killed)}) == 2

    wait_until(both_answer_again, "another takes its place")


def test_rolling_update_loses_no_request(url, hold, pool):
    hold.touch()
    begun = []
    streams = [pool.submit(stream, url, begun) for _ in range(4)]
    wait_until(lambda: len(begun) == 4, "all stream")
    update = pool.submit(deploy, "2", hold)
    hold.unlink()
    while not update.done():
        assert ask(url).status_code == 200
    update.result()
    assert all(whole for _, whole in (one.result() for one in streams))
    assert ask(url).headers["x-version"] == "2"
