"""What a call costs: binding, torch.ops, public function; and a patched layer beside nn.Linear.

The op is rms_norm of one row of 8 values, so that next to nothing but the call is left. Each run is
1000 calls, so the milliseconds read as microseconds a call; `python` is a Python function that does
nothing with the binding's arguments, the part of the figure which belongs to the loop. A LowBitLinear
of 32 columns and 16 rows shows what a quantized layer's call costs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch

from bench.peers.common import Side, arguments, measure

CALLS = 1000


def repeated(call: Callable[..., Any], *operands: Any) -> Side:
    def run() -> None:
        for _ in itertools.repeat(None, CALLS):
            call(*operands)

    return Side(run)


def nothing(*_: Any) -> None:
    return None


def main() -> None:
    args = arguments(__doc__)
    op_call(args)
    layer_call(args)


def op_call(args: argparse.Namespace) -> None:
    import effinfer
    from effinfer._native import native

    x, weight = torch.ones(1, 8), torch.ones(8)
    y = torch.empty_like(x)
    binding = (x, weight, 1e-6, None, False, y, None)
    measure(
        "overhead",
        "rms_norm of 8 values, ms per 1000 calls",
        {
            "effinfer": lambda: repeated(native(x).rms_norm, *binding),
            "torch.ops.effinfer": lambda: repeated(
                torch.ops.effinfer.rms_norm, x, weight, 1e-6, False
            ),
            "effinfer.ops": lambda: repeated(effinfer.ops.rms_norm, x, weight),
            "torch": lambda: repeated(torch.nn.functional.rms_norm, x, (8,), weight, 1e-6),
            "python": lambda: repeated(nothing, *binding),
        },
        args,
    )


def layer_call(args: argparse.Namespace) -> None:
    from effinfer.nn import LowBitLinear
    from effinfer.quant import rtn

    stock = torch.nn.Linear(32, 16)
    quantized = LowBitLinear.from_weight(
        rtn(stock.weight.detach(), format="int4", group_size=32), stock.bias.detach()
    )
    x = torch.ones(1, 32)
    measure(
        "overhead",
        "LowBitLinear of 32 to 16, ms per 1000 calls",
        {
            "effinfer": lambda: repeated(quantized, x),
            "torch": lambda: repeated(stock, x),
            "python": lambda: repeated(nothing, x),
        },
        args,
    )


if __name__ == "__main__":
    main()
