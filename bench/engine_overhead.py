"""What the scheduler itself costs: plan and commit of launches with 64 decoding requests, with the
model left out. ``python -m bench.engine_overhead`` prints microseconds per launch, median and 99th
percentile, per mode."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from effinfer import _native

SLOTS, PROMPT, TOKENS = 64, 32, 400
CASES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "full, 4 loops": {"mode": "full", "loops": 4},
    "exit, 4 loops": {"mode": "exit", "loops": 4},
    "lossless, 4 loops": {"mode": "lossless", "loops": 4},
    "recurrent, 4 loops": {"mode": "full", "loops": 4, "num_states": SLOTS},
    "prompt lookup": {"mode": "full", "max_ngram": 4},
}


def measure(config: dict[str, Any]) -> np.ndarray:
    """Microseconds of plan and commit together, for every launch with all requests decoding."""
    rows = 256
    s = _native.module("_C").Scheduler(
        max_slots=SLOTS,
        max_rows=rows,
        prefill_chunk=128,
        block_size=16,
        num_blocks=SLOTS * 32,
        max_positions=512,
        costs=[1 + n / 64 for n in range(rows)],
        **config,
    )
    for i in range(SLOTS):
        s.submit(i, np.arange(PROMPT, dtype=np.int32) + i, TOKENS)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, 4 * rows).astype(np.int32)
    exits = rng.integers(0, 2, rows).astype(np.uint8)
    taken, prefilled = [], 0
    clock = time.perf_counter
    while s.running or s.waiting:
        begin = clock()
        s.plan(0.0)
        planned = clock()
        wanted, at = s.n_wanted, int(rng.integers(0, rows))
        chosen, leaves = tokens[at : at + wanted], exits[:wanted]
        resumed = clock()
        s.commit(chosen, leaves, 0.0)
        end = clock()
        prefilled = s.stats()["prefill_rows"] if prefilled < SLOTS * PROMPT else prefilled
        if prefilled >= SLOTS * PROMPT and s.running == SLOTS:
            taken.append(planned - begin + end - resumed)
    return np.array(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    figures = {}
    print(f"{'plan + commit, 64 requests':28}{'median us':>10}{'p99 us':>10}")
    for name, config in CASES.items():
        taken = measure(config)
        figures[name] = {
            "median_us": round(float(np.median(taken)), 2),
            "p99_us": round(float(np.percentile(taken, 99)), 2),
            "launches": len(taken),
        }
        print(f"{name:28}{figures[name]['median_us']:10.1f}{figures[name]['p99_us']:10.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
