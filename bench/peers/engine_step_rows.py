"""A launch of several decoding rows over a launch of one, on a block of 51 M parameters.

Four layers of a llama 1024 wide (16 heads of 64, inner width 2816), float32: 206 MB of weights that
a launch reads from DRAM whatever its rows. Each row decodes a sequence of its own, 64 positions in;
the head has 256 outputs. torch's side is the products alone, `F.linear` on the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers.common import OURS, Side, arguments, measure
from effinfer.engine.batch import Batch, Span
from effinfer.engine.runner import BLOCK_SIZE, make_runner

ROWS = (1, 2, 4, 8, 16)
CONTEXT = 64


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=128,
        )
    ).eval()


def launches(model: LlamaForCausalLM) -> Callable[[int], Side]:
    """Launches of so many rows by one runner, whose weights all sides read."""
    runner = make_runner(model)
    per_line = CONTEXT // BLOCK_SIZE + 1
    most = max(ROWS)
    runner.allocate(blocks=most * per_line, states=0, max_rows=CONTEXT, max_slots=most)
    table = np.arange(most * per_line, dtype=np.int32).reshape(most, per_line)
    for line in range(most):  # what is attended to must have been written
        prompt = Span([1 + line] * CONTEXT, 0, line=line)
        runner.launch(Batch.of_spans([prompt], table, BLOCK_SIZE, wanted=[]))

    def side(rows: int) -> Side:
        spans = [Span([7 + line], CONTEXT, line=line) for line in range(rows)]
        batch = Batch.of_spans(spans, table, BLOCK_SIZE, wanted=range(rows))
        return Side(lambda: runner.launch(batch))

    return side


def products(model: LlamaForCausalLM, rows: int) -> Side:
    weights = [
        layer.get_parameter(f"{name}.weight")
        for layer in model.model.layers
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    def run() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)

    return Side(run)


def compare(args: argparse.Namespace) -> None:
    model = build()
    launch = launches(model)

    def name(side: str, rows: int) -> str:
        return side if rows == 1 else f"{side}, {rows} rows"

    measure(
        "engine_step_rows",
        f"51 M-parameter block, threads={args.threads}",
        {name(OURS, rows): lambda n=rows: launch(n) for rows in ROWS}
        | {name("torch", rows): lambda n=rows: products(model, n) for rows in (1, 8)},
        args,
        unit={"GB/s": sum(p.nbytes for p in model.model.layers.parameters()) / 1e9},
    )


def main() -> None:
    args = arguments(__doc__)
    args.seconds *= 3  # a call takes 10 to 60 ms
    compare(args)


if __name__ == "__main__":
    main()
