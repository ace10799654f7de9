"""``lossless`` beside ``full``: early exits as drafts that the remaining loops verify.

    python -m bench.peers.engine_lossless --threads 1

The carried recursive models read docstrings of the standard library and draft whatever their first
loop says. The model of 30 M parameters has random weights: what its loops say is replayed, "sure"
drafts alone (49 % of tokens, 0.905 of them right after one loop), "all" (0.716, and after two and three
loops 0.853 and 0.928), or none right. Its early and last logits are computed, then overruled. Slots
never empty, and both sides read the same packed weights.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.recursive_sides import (
    LOOPS,
    VOCAB,
    Array,
    Busy,
    Judged,
    Packed,
    random_model,
)
from bench.workloads import NO_DRAFT, load_drafts
from effinfer.engine.batch import Batch
from effinfer.engine.policies import ExitPolicy, margin
from effinfer.engine.runner import Runner
from effinfer.engine.wrappers import WrappedRunner
from effinfer.loading import load_model
from effinfer.models import recursive_demo_path

FULL = "full"
MODULES = (
    *("argparse", "ast", "collections", "copy", "csv", "decimal", "difflib", "doctest", "enum"),
    *("fractions", "functools", "heapq", "inspect", "json", "logging", "os", "pickle", "platform"),
)
PROMPT = 16  # tokens
CERTAIN = 1e4  # a logit above all others


class ReplayedDrafts(WrappedRunner):
    """Logits that say the same tokens at full depth every time, and early ones as recorded."""

    def __init__(self, inner: Runner, drafts: Array) -> None:
        super().__init__(inner)
        self._drafts = drafts

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """As ``Runner.launch``."""
        logits = super().launch(batch)
        if logits is None:
            return None
        rows = batch.wanted.numpy()
        positions, loops = batch.positions.numpy()[rows], batch.loops.numpy()[rows] + 1
        requests = batch.line_requests[batch.lines.numpy()[rows]]
        sequences, length = self._drafts.shape
        known = self._drafts[requests % sequences, positions % length]
        wrong = (loops < LOOPS) & (loops < known)
        tokens = (positions * 31 + requests) % (VOCAB // 2) * 2 + wrong
        logits.numpy()[np.arange(len(rows)), tokens] = CERTAIN
        return logits


def docstrings(loops: int) -> list[list[int]]:
    """The beginnings of modules' docstrings, as a carried model's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(recursive_demo_path(loops))
    texts = [importlib.import_module(name).__doc__ or "" for name in MODULES]
    return [ids[:PROMPT] for ids in (tokenizer(text)["input_ids"] for text in texts) if ids]


def compare(
    name: str,
    models: tuple[Runner, Runner],
    batch: int,
    tokens: int,
    policy: ExitPolicy,
    args: argparse.Namespace,
    prompts: Sequence[Sequence[int]] | None = None,
) -> None:
    """One case; ``models``: what each side runs."""
    ours = Busy(models[0], batch, tokens, prompts, mode="lossless", policy=policy)
    plain = Busy(models[1], batch, tokens, prompts)
    ours.run()  # drafts are tried and judged in the first launches

    def facts() -> dict[str, Any]:
        stats = ours.engine.stats()
        kept = ("launches", "draft_rows", "drafts_accepted", "drafts_flushed", "draft_acceptance")
        return {"batch": batch, **{name: stats[name] for name in kept}}

    measure(
        "engine_lossless",
        f"{name}, batch {batch}, threads={args.threads}",
        {OURS: lambda: Side(ours.run), FULL: lambda: Side(plain.run)},
        args,
        facts=facts,
    )
    ours.engine.close()
    plain.engine.close()


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    for loops in (4, 2):
        packed, prompts = Packed(load_model(recursive_demo_path(loops))[0]), docstrings(loops)
        for batch in (1, 4, 8, 16, 64):
            name = f"carried, {loops} loops"
            if args.cases in f"{name}, batch {batch}, threads={args.threads}":
                models = (packed.runner(), packed.runner())
                compare(name, models, batch, 96, margin(-1.0), args, prompts)
    packed = Packed(random_model("depth"))
    recordings = {name: load_drafts(name) for name in ("sure", "all")}
    recordings["wrong"] = np.full_like(recordings["all"], LOOPS)
    for kind, drafts in recordings.items():
        fires = Judged(np.where(drafts == NO_DRAFT, LOOPS, 1))
        for batch in (1, 4, 8, *((16,) if kind == "wrong" else ())):
            name = f"30 M, {kind} drafts"
            if args.cases in f"{name}, batch {batch}, threads={args.threads}":
                ours, plain = (ReplayedDrafts(packed.runner(), drafts) for _ in range(2))
                compare(name, (ours, plain), batch, 32, fires, args)


if __name__ == "__main__":
    main()
