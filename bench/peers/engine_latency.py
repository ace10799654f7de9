"""Seconds a token from arrival, under Poisson arrivals: depth-wise beside plain continuous batching.

    python -m bench.peers.engine_latency --threads 1

Requests of bench/workloads/poisson.json arrive at 0.6 to 0.9 of what plain continuous batching can
do (the same requests, all there at the start). Time is that of the steps, and jumps to the next
arrival where nothing runs. A request's normalised latency is (end - arrival) / its tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from rich.console import Console

from bench.peers.common import OURS, arguments, set_threads, write_case
from bench.peers.recursive_sides import POSITIONS, random_model
from bench.workloads import Request, load_exits, load_workload
from effinfer import Engine, SamplingParams
from effinfer.engine.policies import replay

SLOTS, REQUESTS = 16, 48
LOADS = (0.6, 0.75, 0.9)
FULL = "full"


def serve(engine: Engine, requests: list[Request], scale: float) -> tuple[np.ndarray, float]:
    """Each request's normalised latency, and the seconds until the last ended; arrivals are
    ``scale`` seconds apart on average."""
    clock, waiting, live = 0.0, list(requests), []
    latencies: list[float] = []
    while waiting or live:
        if not live:
            clock = max(clock, waiting[0].arrival * scale)
        while waiting and waiting[0].arrival * scale <= clock:
            request = waiting.pop(0)
            prompt = [1 + (7 * at + len(waiting)) % 4000 for at in range(request.prompt)]
            params = SamplingParams(max_tokens=request.output, ignore_eos=True)
            live.append((request, engine.submit(prompt, params)))
        started = time.perf_counter()
        engine.step()
        clock += time.perf_counter() - started
        for request, handle in live:
            if handle.finish_reason is not None:
                latencies.append((clock - request.arrival * scale) / request.output)
        live = [entry for entry in live if entry[1].finish_reason is None]
    return np.array(latencies), clock


def made(model: Any, **arguments: Any) -> Engine:
    return Engine(model, max_slots=SLOTS, max_positions=POSITIONS, prefix_cache=False, **arguments)


def compare(model: Any, kv_policy: str, args: argparse.Namespace) -> None:
    requests = load_workload("poisson")[: 12 if args.quick else REQUESTS]
    full = made(model)
    ours = made(model, mode="exit", policy=replay(load_exits()))
    sides = {OURS: ours, FULL: full}
    serve(full, requests[:4], 0.0), serve(ours, requests[:4], 0.0)
    _, seconds = serve(full, requests, 0.0)
    capacity = len(requests) / seconds  # requests a second
    for load in LOADS:
        case = f"{kv_policy}, load {load}, threads={args.threads}"
        if args.cases not in case:
            continue
        taken = {}
        for name, engine in sides.items():
            latencies, _ = serve(engine, requests, 1 / (load * capacity))
            taken[name] = {
                "mean": 1e3 * float(latencies.mean()),
                "p50": 1e3 * float(np.percentile(latencies, 50)),
                "p99": 1e3 * float(np.percentile(latencies, 99)),
            }
        ratio = taken[OURS]["mean"] / taken[FULL]["mean"]
        entry = {
            "threads": args.threads,
            "requests": len(requests),
            "capacity_per_s": capacity,
            "ms_per_token": taken,
            "ours_over_full": ratio,
        }
        Console().print(case, {name: round(t["mean"], 2) for name, t in taken.items()})
        print(f"  {ratio:.3f} of full's, mean ms a token from arrival")
        if not args.quick:
            write_case("engine_latency", case, entry)


def main() -> None:
    args = arguments(__doc__)
    set_threads(args.threads)
    compare(random_model("first"), "first", args)


if __name__ == "__main__":
    main()
