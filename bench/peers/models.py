"""Mamba-130M and Mamba-2-130M, prefill and decode: transformers, effinfer-patched, llama.cpp."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench.peers.common import Side, arguments, measure
from bench.peers.gguf_mamba import write_gguf
from bench.peers.hf_models import BUILDERS, prompt
from bench.peers.llama import LlamaModel

PREFILL = (128, 512, 2048)
BATCHES = (1, 8)
CONTEXT = 16  # tokens before the timed decode steps; the cost of a step doesn't depend on it
STEPS = 8
CHECKED = 512  # prompts up to here are compared before they are timed
LOGIT_BOUND = 1e-3


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Last-token logits and a filled cache, as generate() starts."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


class Decoder:
    """Greedy decoding of every row with transformers' own cache, `STEPS` tokens a run."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model = model
        out = model(prompt(CONTEXT, rows), use_cache=True, logits_to_keep=1)
        self.cache, self.tokens = out.cache_params, out.logits[:, -1].argmax(-1, keepdim=True)

    def run(self) -> torch.Tensor:
        for _ in range(STEPS):
            out = self.model(self.tokens, cache_params=self.cache, use_cache=True)
            self.tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        return out.logits[:, -1]


class LlamaDecoder:
    """The same with llama.cpp: one llama_batch a step holds a token of every sequence."""

    def __init__(self, path: Path, threads: int, rows: int) -> None:
        self.llama = LlamaModel(path, threads, rows).open()
        self.start = prompt(CONTEXT, rows).tolist()
        self.tokens = self.llama.start(self.start)

    def run(self) -> torch.Tensor:
        if self.llama.position + STEPS > 4000:
            self.tokens = self.llama.start(self.start)
        for _ in range(STEPS):
            logits = self.llama.step(self.tokens)
            self.tokens = logits.argmax(-1).tolist()
        return torch.from_numpy(logits)


def llama_prefill(path: Path, threads: int, tokens: int) -> Side:
    llama = LlamaModel(path, threads).open()
    ids = prompt(tokens)[0].tolist()
    return Side(lambda: torch.from_numpy(llama.prefill(ids))[None])


def patched(stock: PreTrainedModel, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A second model with the same seed, patched."""
    import effinfer

    model = build()
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
    report = effinfer.patch(model)
    assert report.replaced, report
    return model


class Models:
    """The stock model, its patched twin and the GGUF file of both; each
    is made when first asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.build = BUILDERS[name]
        self.stock = self.build()
        self.folder = folder

    @functools.cached_property
    def gguf(self) -> Path:
        path = self.folder / "model.gguf"
        write_gguf(self.stock, path)
        return path

    @functools.cached_property
    def ours(self) -> PreTrainedModel:
        return patched(self.stock, self.build)


def compare_prefill(models: Models, tokens: int, args: argparse.Namespace) -> None:
    ids = prompt(tokens)
    measure(
        "models",
        f"{args.model} prefill {tokens:4d}, threads={args.threads}",
        {
            "effinfer": lambda: Side(functools.partial(prefill, models.ours, ids)),
            "transformers": lambda: Side(lambda: prefill(models.stock, ids)),
            "llama.cpp": lambda: llama_prefill(models.gguf, args.threads, tokens),
        },
        args,
        reference=(lambda: prefill(models.stock, ids)) if tokens <= CHECKED else None,
        bound=LOGIT_BOUND,
        unit={"tok/s": tokens},
    )


def compare_decode(models: Models, rows: int, args: argparse.Namespace) -> None:
    """Logits are compared in prefill, not here: where two random logits tie, greedy texts part."""
    measure(
        "models",
        f"{args.model} decode batch {rows}, threads={args.threads}",
        {
            "effinfer": lambda: Side(Decoder(models.ours, rows).run),
            "transformers": lambda: Side(Decoder(models.stock, rows).run),
            "llama.cpp": lambda: Side(LlamaDecoder(models.gguf, args.threads, rows).run),
        },
        args,
        unit={"tok/s": rows * STEPS},
    )


def main() -> None:
    args = arguments(__doc__, model={"choices": sorted(BUILDERS), "default": "mamba-130m"})
    with tempfile.TemporaryDirectory() as folder:
        models = Models(args.model, Path(folder))
        for tokens in PREFILL:
            compare_prefill(models, tokens, args)
        for rows in BATCHES:
            compare_decode(models, rows, args)


if __name__ == "__main__":
    main()
