"""Quantizers on one 4096 x 4096 layer with correlated inputs: seconds, and the output's error.

Inputs share factors, an eighth as many as there are channels. Channels are of one size, or of many as
a transformer's are: then the order of columns matters to GPTQ. Each quantizer runs once; 3 and 4
bits, one scale a row. "gptq" takes the columns as they come, "act-order" the largest inputs first;
"gptq+cd" is 10 sweeps from the latter's result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.peers.common import arguments, set_threads, write_case

SIZE, SAMPLES, SWEEPS = 4096, 8192, 25
NOISE = 0.3
SPREADS = {"equal": 0.0, "unequal": 0.5}


def layer(size: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the X^T X of its inputs, whose channels' sizes have this log-normal spread."""
    torch.manual_seed(0)
    factors = torch.randn(size // 8, size) * (size // 8) ** -0.5
    x = torch.randn(SAMPLES, size // 8) @ factors + NOISE * torch.randn(SAMPLES, size)
    x *= torch.randn(size).mul(spread).exp()
    return torch.randn(size, size) * size**-0.5, x.T @ x


def output_error(weight: torch.Tensor, dequantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative squared error of the layer's output over the inputs behind `hessian`."""
    wrong = (dequantized - weight).double()
    exact = weight.double()
    wide = hessian.double()
    return float((wrong @ wide * wrong).sum() / (exact @ wide * exact).sum())


def quantizers() -> dict[str, Callable[..., Any]]:
    from effinfer.quant.gptq import gptq
    from effinfer.quant.quantease import gptq_then_quantease, quantease
    from effinfer.quant.rtn import rtn

    return {
        "rtn": rtn,
        "gptq": partial(gptq, act_order=False),
        "gptq, act-order": gptq,
        "quantease": partial(quantease, sweeps=SWEEPS),
        "gptq+cd": gptq_then_quantease,
    }


def compare(args: argparse.Namespace, *, format: str, channels: str) -> None:
    case = f"{format} {SIZE}x{SIZE}, {channels} channels, {SWEEPS} sweeps, threads={args.threads}"
    if args.cases not in case:
        return
    set_threads(args.threads)
    weight, hessian = layer(SIZE, SPREADS[channels])
    seconds, errors = {}, {}
    for name, quantize in quantizers().items():
        start = time.perf_counter()
        found = quantize(weight, hessian.clone(), format=format, group_size=SIZE)
        seconds[name] = time.perf_counter() - start
        errors[name] = output_error(weight, found.dequantize(), hessian)
    entry = {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "output_error": {name: float(f"{value:.4g}") for name, value in errors.items()},
        "threads": args.threads,
    }
    show(case, entry)
    if not args.quick:
        write_case("quantizers", case, entry)


def show(case: str, entry: dict[str, Any]) -> None:
    table = Table("quantizer", "seconds", "output error", "of gptq's", title=case)
    for name, error in entry["output_error"].items():
        relation = error / entry["output_error"]["gptq"]
        table.add_row(name, f"{entry['seconds'][name]:.1f}", f"{error:.4g}", f"{relation:.3f}")
    Console().print(table)


def main() -> None:
    args = arguments(__doc__)
    for channels in SPREADS:
        for format in ("int3", "int4"):
            compare(args, format=format, channels=channels)


if __name__ == "__main__":
    main()
