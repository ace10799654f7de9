"""Tiny decoders, and schedules to drive a runner by, for the runners' tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from effinfer.engine.batch import Batch, Span

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama_scaled": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def randomise(model: Any, seed: int = 0) -> Any:
    """Weights of a size at which every path matters, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2:
                p.copy_(noise * p.shape[-1] ** -0.5)
            elif "norm" in name:
                p.copy_(1.0 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model.eval()


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family."""
    family, own = FAMILIES.get(name, (name, {}))
    config = AutoConfig.for_model(family, **(_SIZES | own | changes))
    return randomise(AutoModelForCausalLM.from_config(config)).to(dtype)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(1, VOCAB) for _ in range(n)] for n in lengths]


@dataclass
class Piece:
    """A span of a sequence on its way through the loops."""

    start: int
    stop: int
    arena: int
    loop: int = 0  # the next one


@dataclass
class Line:
    """A sequence being run."""

    tokens: list[int]
    fed: int = 0
    pieces: list[Piece] = field(default_factory=list)


class Driver:
    """Runs sequences through a runner in launches as a scheduler might make them."""

    def __init__(self, runner: Any, sequences: Sequence[list[int]], seed: int = 0) -> None:
        self.runner, self.random = runner, random.Random(seed)
        self.lines = [Line(tokens) for tokens in sequences]
        size, longest = runner.spec.block_size, max(map(len, sequences))
        per_line = -(-longest // size)
        blocks = list(range(per_line * len(sequences) + 3))
        self.random.shuffle(blocks)
        table = np.array(blocks[: per_line * len(sequences)], np.int32)
        self.table = table.reshape(len(sequences), per_line)
        total = sum(map(len, sequences))
        runner.allocate(
            blocks=len(blocks),
            states=len(sequences) + 2,
            max_rows=max(total, 64),
            max_slots=len(sequences),
            arena_rows=total,
        )
        runner.poison()
        self.arena = 0
        loops = runner.spec.loops
        self.logits = [torch.zeros(loops, len(s), runner.spec.vocab_size) for s in sequences]

    def spans(self, chunk: int, order: Sequence[int]) -> list[tuple[int, Piece]]:
        """Which pieces run next: at most one new one per line, those of each loop together."""
        chosen = []
        for index in order:
            line = self.lines[index]
            # A scheduler's segments of one loop never follow upon each other: they are one.
            free = self.runner.spec.loops > 1 or not line.pieces
            if free and line.fed < len(line.tokens) and self.random.random() < 0.7:
                stop = min(line.fed + self.random.randint(1, chunk), len(line.tokens))
                line.pieces.append(Piece(line.fed, stop, self.arena))
                self.arena += stop - line.fed
                line.fed = stop
            before = self.runner.spec.loops  # the loops that the piece before has run
            for piece in line.pieces:
                if piece.loop < min(before, self.runner.spec.loops) and self.random.random() < 0.8:
                    chosen.append((index, piece))
                    before = piece.loop + 1
                else:
                    before = piece.loop
        return sorted(chosen, key=lambda c: (c[1].loop, order.index(c[0]), c[1].start))

    def step(self, chunk: int, order: Sequence[int]) -> None:
        """One launch; all logits are wanted."""
        chosen = self.spans(chunk, order)
        if not chosen:
            return
        self.launch(chosen)

    def launch(self, chosen: list[tuple[int, Piece]]) -> None:
        """Run these pieces through their next loops."""
        policy, spans, rows = self.runner.spec.kv_policy, [], 0
        for index, piece in chosen:
            tokens = self.lines[index].tokens[piece.start : piece.stop]
            state_in = index if piece.start else -1
            writes = policy == "depth" or piece.loop == 0
            spans.append(
                Span(tokens, piece.start, piece.loop, index, state_in, index, piece.arena, writes)
            )
            rows += len(tokens)
        size = self.runner.spec.block_size
        batch = Batch.of_spans(spans, self.table, size, wanted=range(rows))
        logits = self.runner.launch(batch)
        first = 0
        for index, piece in chosen:
            count = piece.stop - piece.start
            own = self.logits[index][piece.loop]
            own[piece.start : piece.stop] = logits[first : first + count]
            first += count
            piece.loop += 1
        for line in self.lines:
            line.pieces = [p for p in line.pieces if p.loop < self.runner.spec.loops]

    def launch_tokens(
        self,
        index: int,
        start: int,
        stop: int,
        wanted: Sequence[int],
        states: tuple[int, int] = (-1, 0),
    ) -> Any:
        """One launch of these positions alone, in loop 0."""
        span = Span(self.lines[index].tokens[start:stop], start, 0, index, *states)
        size = self.runner.spec.block_size
        return self.runner.launch(Batch.of_spans([span], self.table, size, wanted=wanted))

    def feed_all(self, tokens: int) -> None:
        """One launch of the first tokens of every sequence."""
        chosen = []
        for index, line in enumerate(self.lines):
            line.fed = min(tokens, len(line.tokens))
            line.pieces.append(Piece(0, line.fed, self.arena))
            self.arena += line.fed
            chosen.append((index, line.pieces[0]))
        self.launch(chosen)

    @staticmethod
    def pair(source: int, target: int) -> Any:
        """State slots to copy."""
        return np.array([[source, target]], np.int32)

    def run(self, chunk: int = 6, order: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Logits ``(loops, positions, vocab)`` of every sequence."""
        order = range(len(self.lines)) if order is None else order
        while any(line.fed < len(line.tokens) or line.pieces for line in self.lines):
            self.step(chunk, order)
        return self.logits


def serial(model: Any, tokens: list[int]) -> torch.Tensor:
    """The model's own logits of one sequence, in one forward."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits
