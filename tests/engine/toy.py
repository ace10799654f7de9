"""A model simple enough to know its tokens by heart, as a runner for the engine's tests.

A row's logits are a pseudo-random function of the tokens it can see through the block table, and of
its loop: early loops agree with the last one most of the time.
"""

from __future__ import annotations

import numpy as np
import torch

from effinfer.engine.engine import Engine
from effinfer.engine.runner import RunnerSpec
from effinfer.engine.sampling import RowParams, sample

VOCAB = 61
POISON = VOCAB - 1  # a prompt with this token gets NaN logits
BLOCK = 4


def toy_logits(tokens, loop, loops):
    """Logits after ``loop`` (from 0) of the last of ``tokens``."""
    seed = np.array(tokens, dtype=np.uint64)
    mixed = int(
        np.bitwise_xor.reduce(
            (seed + np.uint64(1)) * np.arange(3, 3 + 2 * len(seed), 2, dtype=np.uint64)
        )
    )
    rng = np.random.default_rng([mixed, len(tokens)])
    logits = 2.0 * rng.standard_normal(VOCAB)
    for later in range(loops - 1, loop, -1):  # what the later loops would still change
        logits = logits + 0.6 * np.random.default_rng([mixed, later]).standard_normal(VOCAB)
    logits[POISON] = -np.inf  # never generated
    return torch.from_numpy(logits.astype(np.float32))


def serial(prompt, params, *, loops=1, policy=None, seed=None, stop_ids=()):
    """The tokens and depths of one request alone, by definition."""
    tokens, depths = list(prompt), []
    if params.exit_threshold is not None and policy is not None:
        policy = params.exit_threshold
    least = loops if params.mode == "full" else params.min_loops
    most = params.max_loops or loops
    row = RowParams(params, (params.seed or 0) if seed is None else seed, len(prompt), stop_ids)
    while len(depths) < params.max_tokens:
        for loop in range(loops):
            logits = toy_logits(tokens, loop, loops)[None]
            top = logits.softmax(-1).topk(2).values[0]
            sure = policy is not None and float(top[0] - top[1]) > policy
            if loop == most - 1 or (sure and loop >= least - 1):
                break
        history = np.array(tokens, dtype=np.int32)
        token = int(sample(logits, [row], np.array([len(tokens) - 1]), lambda _, h=history: h)[0])
        tokens.append(token)
        depths.append(loop + 1)
        if token in stop_ids:
            break
    return tokens[len(prompt) :], depths


class ToyRunner:
    """Keeps the tokens themselves where a model keeps keys and values."""

    def __init__(self, loops=1, max_positions=64, kv_policy="depth"):
        self.spec = RunnerSpec(
            vocab_size=VOCAB,
            max_positions=max_positions,
            loops=loops,
            r_min=1,
            kv_policy=kv_policy,
            has_kv=True,
            has_state=False,
            block_size=BLOCK,
            bytes_per_block=100,
            bytes_per_state=0,
            dtype=torch.float32,
            window=None,
        )
        self.closed = False
        self.explode = False
        self.raises_on = None  # a token that makes launches raise
        self.widest = 0

    def allocate(self, *, blocks, states, max_rows, max_slots, arena_rows=0):
        self.planes = np.full((self.spec.loops, blocks * BLOCK), -1)
        self.arena = np.full(max(arena_rows, max_rows), -1)

    def launch(self, batch):
        if self.explode:
            raise RuntimeError("boom")
        self.widest = max(self.widest, batch.rows)
        tokens, positions, loops, arena, lines, slots = (
            x.numpy()
            for x in (
                batch.tokens,
                batch.positions,
                batch.loops,
                batch.arena,
                batch.lines,
                batch.kv_slots,
            )
        )
        seen = np.where(loops == 0, tokens, self.arena[arena])
        if self.raises_on in seen:
            raise ArithmeticError(f"token {self.raises_on}")
        self.arena[arena] = seen
        self.planes[loops[slots >= 0], slots[slots >= 0]] = seen[slots >= 0]
        if not len(batch.wanted):
            return None
        out = torch.empty(len(batch.wanted), VOCAB)
        for i, row in enumerate(batch.wanted.tolist()):
            at = np.arange(positions[row] + 1)
            blocks = batch.block_table[lines[row]].numpy()[at // BLOCK]
            plane = loops[row] if self.spec.kv_policy == "depth" else 0
            context = self.planes[plane, blocks * BLOCK + at % BLOCK]
            assert (context >= 0).all(), "a row reads what was never written"
            out[i] = toy_logits(context.tolist(), int(loops[row]), self.spec.loops)
            if POISON in context:
                out[i] = float("nan")
        return out

    def hidden(self, rows):
        return torch.from_numpy(self.arena[rows.numpy()]).float()[:, None]

    def close(self):
        self.closed = True


class Letters:
    """A tokenizer of one letter a token."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(ord("A") + i) for i in ids)

    def __call__(self, text):
        return {"input_ids": [ord(c) - ord("A") for c in text]}


def make(loops=1, **options):
    """An engine over a toy of so many loops, or over ``runner=``."""
    options = {"max_slots": 4, "token_budget": 12, "prefill_chunk": 5, **options}
    runner = options.pop("runner", None) or ToyRunner(loops)
    if options.get("mode") == "lossless" or options.get("max_ngram"):
        options.setdefault("costs", [1.0 + 0.01 * n for n in range(options["token_budget"])])
    return Engine(runner, **options)


def prompt_of(seed, length):
    """A prompt without POISON, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, POISON, length).tolist()
