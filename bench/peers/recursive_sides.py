"""Recursive models that matter in size, and engines kept busy with them: for the engine_* benches.

The weights are random: no exit rule means anything on them, so exits are replayed. A block of 28 M
parameters in float32 (113 MB, far beyond any cache) and a head of 3 M.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.workloads import load_exits
from effinfer import Engine, SamplingParams
from effinfer.engine.batch import Batch, Span
from effinfer.engine.handle import Handle
from effinfer.engine.policies import Replay
from effinfer.engine.runner import BLOCK_SIZE, Runner, make_runner
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM

LOOPS, WIDTH, LAYERS, VOCAB = 4, 768, 4, 4096
POSITIONS = 512
Array = np.ndarray[Any, Any]


def random_model(kv_policy: str, *, lora_rank: int = 8, loops: int = LOOPS) -> RecursiveForCausalLM:
    """A block of 4 layers, 768 wide, the same for every call with the same arguments."""
    torch.manual_seed(0)
    config = RecursiveConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_attention_heads=12,
        block_layers=LAYERS,
        loops=loops,
        lora_rank=lora_rank,
        kv_policy=kv_policy,
        max_position_embeddings=POSITIONS,
    )
    model = RecursiveForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros, as made: then it would add nothing
                parameter.normal_(std=0.02)
    return model


class Packed:
    """Runners over one packed copy of a model's weights, each with pages of its own.

    Where the weights come to lie decides about up to 5 % of a launch's time: sides that are to differ
    by less must read the same ones.
    """

    def __init__(self, model: Any) -> None:
        self._runner = make_runner(model)

    def runner(self) -> Runner:
        """A runner that has allocated nothing yet."""
        return copy.copy(self._runner)


class Judged(Replay):
    """The same exits, from a policy that must see the logits of every row that may exit."""

    name = "judged"
    needs_logits = True


def exits(batch: int, tokens: int) -> Array:
    """Recorded exits of ``batch`` requests of ``tokens`` tokens."""
    return load_exits()[:batch, :tokens]


class Busy:
    """An engine whose slots never empty: requests of ``tokens`` tokens, one after the other in each.

    All begin at once. Prompts are of one token, unless given, so that no launch is spent on them.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        tokens: int,
        prompts: Sequence[Sequence[int]] | None = None,
        **arguments: Any,
    ) -> None:
        self.batch, self.tokens = batch, tokens
        self._prompts = prompts or [[1 + i] for i in range(64)]
        self.engine = Engine(
            model, max_slots=batch, max_positions=POSITIONS, prefix_cache=False, **arguments
        )
        self._params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self._running: list[Handle] = []
        self._ended = self._submitted = 0

    def run(self, tokens: int | None = None) -> None:
        """Step until that many more tokens of each slot have been delivered: a whole request's."""
        target = self._delivered() + self.batch * (tokens or self.tokens)
        while self._delivered() < target:
            self._refill()
            self.engine.step()

    def _delivered(self) -> int:
        return self._ended + sum(len(handle.tokens) for handle in self._running)

    def _refill(self) -> None:
        left = [handle for handle in self._running if len(handle.tokens) < self.tokens]
        self._ended += self.tokens * (len(self._running) - len(left))
        while len(left) < self.batch:
            prompt = self._prompts[self._submitted % len(self._prompts)]
            left.append(self.engine.submit(prompt, self._params))
            self._submitted += 1
        self._running = left


def launches(
    runner: Runner, batch: int, *, loop: int, head: bool, count: int
) -> Callable[[], None]:
    """``count`` launches of ``batch`` rows, all at one loop and in the middle of their sequences."""
    blocks = POSITIONS // BLOCK_SIZE
    runner.allocate(blocks=batch * blocks, states=0, max_rows=batch, max_slots=batch)
    table = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    spans = [Span([1], 32, loop, line, arena=line) for line in range(batch)]
    launch = Batch.of_spans(spans, table, BLOCK_SIZE, wanted=range(batch if head else 0))

    def run() -> None:
        for _ in range(count):
            runner.launch(launch)

    return run
