"""What the engine adds to a launch: scheduling, dispatch, sampling and delivery of 64 rows.

The model is a runner that returns the same logits at once. Each run is 100 launches. `scheduler` is
plan() and commit() alone; `dispatch_us` is a step without the choice of tokens and the runner.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.peers.common import Side, arguments, measure
from effinfer import Engine, SamplingParams
from effinfer._native import module
from effinfer.engine.batch import Batch
from effinfer.engine.runner import RunnerSpec

ROWS, VOCAB, STEPS = 64, 1024, 100
TOKENS = 16_000  # of a request, before it is submitted again
BLOCK = 16


class NullRunner:
    """Logits at no cost."""

    def __init__(self) -> None:
        self.spec = RunnerSpec(
            vocab_size=VOCAB,
            max_positions=TOKENS + BLOCK,
            loops=1,
            r_min=1,
            kv_policy="depth",
            has_kv=True,
            has_state=False,
            block_size=BLOCK,
            bytes_per_block=1,
            bytes_per_state=0,
            dtype=torch.float32,
            window=None,
        )
        self._logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))

    def allocate(self, **sizes: int) -> None:
        """Nothing to keep."""

    def launch(self, batch: Batch) -> torch.Tensor:
        return self._logits[: len(batch.wanted)]

    def close(self) -> None:
        """Nothing to give back."""


def stepping(params: SamplingParams) -> tuple[Engine, Side]:
    """An engine with 64 requests that decode, and 100 of its steps."""
    engine = Engine(NullRunner(), max_slots=ROWS, prefix_cache=False)

    def run() -> None:
        for _ in range(STEPS):
            if not engine.step():
                for prompt in range(ROWS):
                    engine.submit([1, 2, prompt + 3], params)

    run()
    return engine, Side(run)


def scheduling() -> Side:
    """plan() and commit() of 64 decoding requests."""
    blocks = -(-TOKENS // BLOCK) + 1
    scheduler = module("_C").Scheduler(
        max_slots=ROWS,
        max_rows=256,
        prefill_chunk=128,
        block_size=BLOCK,
        num_blocks=ROWS * blocks,
        max_positions=blocks * BLOCK,
        prefix_cache=False,
    )
    ids = iter(range(2**62))
    tokens = {n: np.ones(n, dtype=np.int32) for n in range(ROWS + 1)}

    def run() -> None:
        for _ in range(STEPS):
            if scheduler.plan(0.0) == 0:
                for _ in range(ROWS):
                    scheduler.submit(next(ids), np.ones(3, dtype=np.int32), TOKENS)
            else:
                scheduler.commit(tokens[scheduler.n_wanted], None, 0.0)

    run()
    return Side(run)


def split_of(engine: Engine) -> Callable[[], dict[str, Any]]:
    """Microseconds a launch of dispatch, and of choosing tokens."""

    def facts() -> dict[str, Any]:
        before, started = engine.stats(), time.perf_counter()
        while time.perf_counter() - started < 0.2:
            engine.step()
        after = engine.stats()
        launches = after["launches"] - before["launches"]
        parts = {
            name: 1e6 * (after[f"{name}_seconds"] - before[f"{name}_seconds"]) / launches
            for name in ("step", "choose", "launch")
        }
        return {
            "dispatch_us": parts["step"] - parts["choose"] - parts["launch"],
            "choose_us": parts["choose"],
        }

    return facts


def case(name: str, params: SamplingParams, args: argparse.Namespace) -> None:
    engine, side = stepping(params)
    entry = measure(
        "engine_step",
        f"{name}, {ROWS} rows, ms per {STEPS} launches",
        {"effinfer": lambda: side, "scheduler": scheduling},
        args,
        facts=split_of(engine),
    )
    engine.close()
    if entry is not None:
        print(f"  dispatch {entry['dispatch_us']:.1f} us, choice {entry['choose_us']:.1f} us")


def main() -> None:
    args = arguments(__doc__)
    case("greedy", SamplingParams(max_tokens=TOKENS), args)
    case("temperature", SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=0), args)
    filtered = SamplingParams(max_tokens=TOKENS, temperature=0.8, top_k=50, top_p=0.9, seed=0)
    case("top-k and top-p", filtered, args)


if __name__ == "__main__":
    main()
