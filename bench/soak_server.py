"""The server that bench/soak.py loads: ``effinfer serve``'s own, over a model with faults in it.

A prompt that ends in the token ``POISON`` gets NaN logits; SIGUSR1 makes every launch of the runner
raise, which breaks the engine down. ``/ledger`` counts admitted requests and their ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.soak import POISON
from effinfer.engine import Engine, Handle
from effinfer.engine.batch import Batch
from effinfer.engine.runner import make_runner
from effinfer.loading import load_model
from effinfer.models import recursive_demo_path
from effinfer.serve import ServeSettings, create_app
from effinfer.serve.run import run

SLOTS, QUEUE = 16, 32
SETTINGS = ServeSettings(
    model_name="soak", write_timeout_s=2.0, max_body_bytes=1 << 16, deadline_s=60.0, drain_s=30.0
)


CARRIED = {
    "demo-recursive": recursive_demo_path,
    "demo-recursive-r2": lambda: recursive_demo_path(2),
}


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer. "llama" is the engine's benchmark model, which like real ones takes
    nearly all of the time; beside a carried model HTTP takes more than it."""
    if name in CARRIED:
        return load_model(CARRIED[name]())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), load_model(recursive_demo_path())[1]


class Ledger:
    """Counts requests that were admitted and ended, and those that ended twice or never."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self.admitted = self.ended = self.ended_again = 0
        made, end = Handle.__init__, Handle.end

        def count_made(handle: Handle, *args: Any, **options: Any) -> None:
            made(handle, *args, **options)
            with self._lock:
                self._open.add(id(handle))
                self.admitted += 1

        def count_end(handle: Handle, reason: str, error: str | None = None) -> None:
            with self._lock:
                if id(handle) in self._open:
                    self._open.remove(id(handle))
                    self.ended += 1
                else:
                    self.ended_again += 1
            end(handle, reason, error)

        Handle.__init__ = count_made  # type: ignore[method-assign]
        Handle.end = count_end  # type: ignore[method-assign]

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {
                "admitted": self.admitted,
                "ended": self.ended,
                "ended_again": self.ended_again,
                "open": len(self._open),
            }


class Faulty:
    """A runner that breaks for good when told to, and poisons what asks for it."""

    crash = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.spec = inner.spec
        self._dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, batch: Batch) -> torch.Tensor | None:
        if Faulty.crash:
            self._dead, Faulty.crash = True, False
        if self._dead:
            raise RuntimeError("told to")
        logits: torch.Tensor | None = self._inner.launch(batch)
        if logits is not None:
            logits[:, POISON] = -torch.inf  # never generated
            poisoned = batch.tokens[batch.wanted.long()] == POISON
            if bool(poisoned.any()):
                logits[poisoned] = torch.nan
        return logits


def main(name: str, port: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load(name)
    ledger = Ledger()

    def crash(*_: object) -> None:
        Faulty.crash = True

    signal.signal(signal.SIGUSR1, crash)

    def make_engine() -> Engine:
        runner = Faulty(make_runner(model))
        return Engine(runner, tokenizer, max_slots=SLOTS, max_queue=QUEUE)

    app = create_app(make_engine, tokenizer, SETTINGS)

    @app.get("/ledger")
    async def counts() -> dict[str, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            **ledger.counts(),
            "slots": SLOTS,
            "queue": QUEUE,
            "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        }

    run(app, SETTINGS, "127.0.0.1", port)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
