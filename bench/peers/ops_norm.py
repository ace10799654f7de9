"""rms_norm and layer_norm: effinfer, torch's own, and memcpy.

`memcpy` is torch's copy_ of the same bytes into a tensor that exists, so its ratio is the fraction
of the copy bandwidth that the norm reaches; one row is all call.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch.nn import functional

from bench.peers.common import Side, arguments, measure

ROWS, DIMS, TYPES = (512, 1), (768, 1536, 4096), (torch.float32, torch.bfloat16)
NORMS = ("rms_norm", "layer_norm")
EPS = 1e-5


def compare(norm: str, rows: int, dim: int, dtype: torch.dtype, args: argparse.Namespace) -> None:
    """One norm; torch takes the parameters in x's type."""
    from effinfer import ops

    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, dim).to(dtype), torch.randn(dim), torch.randn(dim)
    narrow, shift, target = weight.to(dtype), bias.to(dtype), torch.full_like(x, 0.0)
    if norm == "rms_norm":
        ours = Side(lambda: ops.rms_norm(x, weight, EPS))
        stock = Side(lambda: functional.rms_norm(x, (dim,), narrow, EPS))
    else:
        ours = Side(lambda: ops.layer_norm(x, weight, bias, EPS))
        stock = Side(lambda: functional.layer_norm(x, (dim,), narrow, shift, EPS))
    measure(
        "ops_norm",
        f"{norm} {rows}x{dim} {str(dtype).removeprefix('torch.')}, threads={args.threads}",
        {"effinfer": lambda: ours, "torch": lambda: stock},
        args,
        reference=stock.output,
        bound=1e-5 if dtype is torch.float32 else 1e-2,
        extra={"memcpy": lambda: Side(lambda: target.copy_(x))},
    )


def main() -> None:
    args = arguments(__doc__)
    for dtype, rows, dim, norm in itertools.product(TYPES, ROWS, DIMS, NORMS):
        compare(norm, rows, dim, dtype, args)


if __name__ == "__main__":
    main()
