"""Replicas of a server on one machine or many, by Ray Serve. Nothing else here knows of Ray.

Every replica is a whole server: its own model, engine, limits and metrics. Ray's proxy spreads
requests over them, replaces those that die, makes more when requests queue, and replaces all, one
after the other, when the application is deployed again. Its ``@serve.batch`` is not used: it would
batch requests, where the engine batches launches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
os.environ.setdefault("RAY_worker_niceness", "0")  # replicas are no work for idle hours, as 15 says

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig

from effinfer.serve.settings import ServeSettings

NAME = "effinfer"
_LAST_WORDS_S = 5  # of a replica that stops, beyond its drain


def application(
    build: Callable[[], FastAPI],
    settings: ServeSettings,
    *,
    max_slots: int,
    max_queue: int,
    replicas: int = 1,
    max_replicas: int | None = None,
    react_s: float = 10,
    cpus: float = 1,
) -> serve.Application:
    """A Ray Serve application, for ``serve.run``.

    Args:
        build: makes the application that a replica serves; called in the replica's process.
        settings: those that ``build`` gives to ``create_app``.
        max_slots, max_queue: of each replica's engine.
        replicas: how many there are, or are at least.
        max_replicas: how many Ray may make when more than ``max_slots`` requests run or wait in each.
        react_s: seconds that there must be so many before it makes one; also between looks at whether
            a replica is dead, or done.
        cpus: that Ray reserves for a replica.
    """

    def build_app() -> FastAPI:  # Ray wants a function
        return build()

    scale: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas,
                max_replicas=max_replicas,
                target_ongoing_requests=max_slots,
                metrics_interval_s=react_s / 10,
                look_back_period_s=react_s,
                upscale_delay_s=react_s,
            )
        }
    # The engine says 429 when it is full, so more than it can hold must get through to it.
    held = 2 * (max_slots + max_queue)
    deployment = serve.deployment(
        serve.ingress(build_app)(),
        name=NAME,
        max_ongoing_requests=held,
        max_queued_requests=held,
        graceful_shutdown_timeout_s=settings.drain_s + _LAST_WORDS_S,
        graceful_shutdown_wait_loop_s=min(react_s, 2),
        health_check_period_s=react_s,
        ray_actor_options={"num_cpus": cpus},
        **scale,
    )
    return deployment.bind()


def start(host: str, port: int, **ray_options: Any) -> None:
    """Start Ray's proxy, in the cluster that RAY_ADDRESS names or one on this machine alone."""
    if not ray.is_initialized():
        options = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(log_to_driver=False, **{**options, **ray_options})
    serve.start(http_options={"host": host, "port": port})


def deploy(app: serve.Application) -> None:
    """Deploy an application and wait until it takes requests; over another, replica by replica."""
    serve.run(app, name=NAME, route_prefix="/")


def run(app: serve.Application, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; then let requests end and stop the replicas."""
    asked = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: asked.set())
    start(host, port)
    try:
        deploy(app)
        asked.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
