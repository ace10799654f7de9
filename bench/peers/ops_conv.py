"""causal_conv1d with silu, widths 2..8: effinfer, transformers' torch path, ggml, and memcpy.

`memcpy` is torch's copy_ of the same bytes in the same memory order, so its ratio is the fraction
of the copy bandwidth that the convolution reaches. It copies into memory that exists, where the
convolution allocates its result; `clone` allocates too, and so shows what new pages cost where the
allocator has given the last result's back. `cache` cases reuse one pair of buffers, as a layer's
convolution finds its input just written; `dram` cases walk over more than 192 MB.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from bench.peers.common import Side, arguments, measure
from bench.peers.ggml import Graph

LENGTH = 512
DRAM_BYTES = 192 << 20


def inputs(channels: int, layout: str, residence: str) -> list[torch.Tensor]:
    """(1,D,L) tensors of the layout; many of them for `dram`."""
    count = 1 if residence == "cache" else DRAM_BYTES // (channels * LENGTH * 4) + 1
    if layout == "time-major":
        return [torch.randn(1, LENGTH, channels).transpose(1, 2) for _ in range(count)]
    if layout == "strided":  # every second value, so that no stride is 1
        return [torch.randn(1, channels, 2 * LENGTH)[..., ::2] for _ in range(count)]
    return [torch.randn(1, channels, LENGTH) for _ in range(count)]


def walking(call: Callable[[torch.Tensor], torch.Tensor], xs: list[torch.Tensor]) -> Side:
    """Each run takes the next input; the check looks at the first."""
    turn = itertools.cycle(xs)
    return Side(lambda: call(next(turn)), lambda: call(xs[0]))


def effinfer_side(xs: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> Side:
    from effinfer import ops

    return walking(lambda x: ops.causal_conv1d(x, weight, bias, "silu")[0], xs)


def transformers_side(xs: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> Side:
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    return walking(lambda x: causal_conv1d_fn(x, weight, bias, activation="silu"), xs)


def copy_side(xs: list[torch.Tensor]) -> Side:
    targets = {id(x): torch.full_like(x, 0.0) for x in xs}  # written once, so that its pages exist
    return walking(lambda x: targets[id(x)].copy_(x), xs)


def ggml_side(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threads: int) -> Side:
    """llama.cpp's chain from a time-major x: concat with the state, ssm_conv, bias, silu."""
    channels, width = weight.shape
    graph = Graph(64 + channels * LENGTH * 4 * 6 // 2**20, threads)
    past = graph.tensor(torch.zeros(1, channels, width - 1))
    columns = graph.concat(past, graph.op("transpose", graph.tensor(x[0].T)), axis=0)
    y = graph.op("ssm_conv", columns, graph.tensor(weight))
    y = graph.op("silu", graph.op("add", y, graph.tensor(bias)))
    graph.finish(y)
    return Side(graph.run, lambda: graph.read(y, LENGTH, channels).T[None])


def compare(
    channels: int, width: int, layout: str, residence: str, args: argparse.Namespace
) -> None:
    torch.manual_seed(0)
    xs = inputs(channels, layout, residence)
    weight, bias = torch.randn(channels, width) * 0.5, torch.randn(channels)
    stock = transformers_side(xs, weight, bias)
    factories: dict[str, Callable[[], Side]] = {
        "effinfer": lambda: effinfer_side(xs, weight, bias),
        "transformers": lambda: stock,
    }
    if residence == "cache" and layout == "time-major":
        factories["ggml"] = lambda: ggml_side(xs[0], weight, bias, args.threads)
    measure(
        "ops_conv",
        f"D{channels} W{width} L{LENGTH} {layout} {residence}, threads={args.threads}",
        factories,
        args,
        reference=stock.output,
        extra={"memcpy": lambda: copy_side(xs), "clone": lambda: walking(torch.clone, xs)},
    )


def main() -> None:
    args = arguments(__doc__)
    for channels, layout, residence in itertools.product(
        (1536, 8192), ("contiguous", "time-major", "strided"), ("cache", "dram")
    ):
        widths = (2, 3, 4, 5, 6, 7, 8) if channels == 1536 else (4,)
        for width in widths:
            compare(channels, width, layout, residence, args)


if __name__ == "__main__":
    main()
