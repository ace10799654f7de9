"""Packed linear against torch: 1 and 8 rows on DRAM-resident weights, 512 rows in f32 and bf16."""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F

from bench.peers.ceilings import ceilings
from bench.peers.common import Side, arguments, measure

SHAPES = ((768, 3072), (1536, 768), (2048, 2048), (4096, 4096))  # (in, out)
DRAM_BYTES = 192 << 20
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def copies(weight: torch.Tensor, rows: int) -> int:
    """Few rows walk over enough copies of the weight that none is still in cache."""
    return 1 if rows > 16 else DRAM_BYTES // weight.nbytes + 1


def effinfer_side(x: torch.Tensor, weight: torch.Tensor) -> Side:
    from effinfer import ops

    out_features = weight.shape[0]
    packed = [ops.pack_linear(weight) for _ in range(copies(weight, len(x)))]
    turn = itertools.cycle(packed)
    return Side(lambda: ops.linear(x, next(turn), out_features))


def torch_side(x: torch.Tensor, weight: torch.Tensor) -> Side:
    turn = itertools.cycle([weight.clone() for _ in range(copies(weight, len(x)))])
    return Side(lambda: F.linear(x, next(turn)))


def few_rows(inputs: int, outputs: int, args: argparse.Namespace) -> None:
    """1 and 8 rows of both sides in one case; every time is set against effinfer's 1 row."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    x = torch.randn(8, inputs)
    measure(
        "ops_linear",
        f"linear f32 {inputs}x{outputs}, few rows, threads={args.threads}",
        {
            "effinfer": lambda: effinfer_side(x[:1], weight),
            "torch": lambda: torch_side(x[:1], weight),
        },
        args,
        reference=lambda: F.linear(x[:1], weight),
        bound=BOUNDS[torch.float32],
        extra={
            "effinfer, 8 rows": lambda: effinfer_side(x, weight),
            "torch, 8 rows": lambda: torch_side(x, weight),
        },
        unit={"GB/s": weight.nbytes / 1e9},
        facts=lambda: {"ceilings": ceilings(args.threads)},
    )


def many_rows(inputs: int, outputs: int, dtype: torch.dtype, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    x = torch.randn(512, inputs).to(dtype)
    name = "f32" if dtype == torch.float32 else "bf16"
    measure(
        "ops_linear",
        f"linear {name} {inputs}x{outputs}, 512 rows, threads={args.threads}",
        {
            "effinfer": lambda: effinfer_side(x, weight),
            "torch": lambda: torch_side(x, weight),
        },
        args,
        reference=lambda: F.linear(x.float(), weight.float()),
        bound=BOUNDS[dtype],
        unit={"GFLOP/s": 2 * 512 * inputs * outputs / 1e9},
        facts=lambda: {"ceilings": ceilings(args.threads)},
    )


def main() -> None:
    args = arguments(__doc__)
    for inputs, outputs in SHAPES:
        few_rows(inputs, outputs, args)
        many_rows(inputs, outputs, torch.float32, args)
        many_rows(inputs, outputs, torch.bfloat16, args)


if __name__ == "__main__":
    main()
