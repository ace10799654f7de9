"""Products of signs (XNOR) with channel scales, and binary 3x3 convolutions, beside torch in f32."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.peers import lowbit_ours as ours
from bench.peers.ceilings import ceilings
from bench.peers.common import Side, arguments, measure
from bench.peers.lowbit_case import Case, ends
from bench.peers.ops_lowbit import ROWS, SAMPLE_S, SETTLE_S, SHAPES

CONVS = ((128, 28), (256, 14), (512, 7))  # (channels, side length), ResNet-18's 3x3 layers
IMAGES = 8
BOUND = 1e-5


def signs(x: torch.Tensor) -> torch.Tensor:
    """-1 where negative, else +1."""
    return torch.where(x < 0, -1.0, 1.0)


def linear_ours(case: Case, *, packed_signs: bool) -> Side:
    """From float32 x, whose signs are packed in the call; or from packed signs."""
    from effinfer import ops

    x, w = case.x(), case.weight()
    scale = w.abs().mean(1)
    packed = ops.pack_binary(w)
    turn = case.turns(packed, packed.nbytes, lambda _: ops.pack_binary(w))
    operand = ops.pack_signs(x) if packed_signs else x
    n, k = case.outputs, case.inputs
    truth = case.truth(signs(w) * scale[:, None], signs(x))
    return Side(lambda: ops.binary_linear(operand, turn(), k, n, scale), None, truth, packed.nbytes)


def linear_torch(case: Case) -> Side:
    x, w = signs(case.x()), signs(case.weight()) * case.weight().abs().mean(1, keepdim=True)
    turn = case.turns(w, w.nbytes, torch.clone)
    return Side(lambda: F.linear(x, turn()), None, case.truth(w, x), w.nbytes)


def linears(args: argparse.Namespace) -> None:
    for outputs, inputs in SHAPES:
        for rows in ROWS:
            case = Case("plain", outputs, inputs, rows, args.threads)
            run(
                f"xnor N{outputs} K{inputs}, {rows} rows",
                {
                    "effinfer": partial(linear_ours, case, packed_signs=False),
                    "torch f32": partial(linear_torch, case),
                    "effinfer, packed signs": partial(linear_ours, case, packed_signs=True),
                },
                2 * rows * outputs * inputs,
                args,
            )


def conv_ours(weight: torch.Tensor, x: torch.Tensor) -> Side:
    """Thresholds at 0, zero padding, channel scales; x is float32 with channels last."""
    from effinfer import ops

    packed = ops.pack_binary_conv2d(weight)
    scale = weight.abs().mean((1, 2, 3))
    outputs, inputs = weight.shape[:2]
    return Side(lambda: ops.binary_conv2d(x, packed, inputs, outputs, 3, scale, padding=1))


def conv_torch(weight: torch.Tensor, x: torch.Tensor) -> Side:
    w = signs(weight) * weight.abs().mean((1, 2, 3), keepdim=True)
    w = w.contiguous(memory_format=torch.channels_last)
    x = signs(x).contiguous(memory_format=torch.channels_last)
    return Side(lambda: F.conv2d(x, w, padding=1))


def convs(args: argparse.Namespace) -> None:
    for channels, side in CONVS:
        torch.manual_seed(channels)
        weight = torch.randn(channels, channels, 3, 3)
        x = torch.randn(IMAGES, channels, side, side)
        x = x.contiguous(memory_format=torch.channels_last)
        exact = signs(weight).double() * weight.abs().mean((1, 2, 3), keepdim=True).double()
        run(
            f"conv 3x3 {channels} channels, {IMAGES} x {side}x{side}",
            {
                "effinfer": partial(conv_ours, weight, x),
                "torch f32": partial(conv_torch, weight, x),
            },
            2 * 9 * x.numel() * channels,
            args,
            reference=partial(F.conv2d, signs(x).double(), exact, padding=1),
            op="binary_conv2d",
        )


def run(
    name: str,
    sides: dict[str, Callable[[], Side]],
    operations: int,
    args: argparse.Namespace,
    *,
    reference: Callable[[], torch.Tensor] | None = None,
    op: str = "binary_linear",
) -> None:
    measure(
        "ops_binary",
        f"{name}, threads={args.threads}",
        sides,
        args,
        reference=reference,
        bound=BOUND,
        part=ends,
        unit={"GOPS": operations / 1e9},
        facts=lambda: {"ceilings": ceilings(args.threads), "effinfer": ours.build(op)},
        sample_s=SAMPLE_S,
        settle_s=SETTLE_S,
    )


def main() -> None:
    args = arguments(__doc__, installed=ours.INSTALLED)
    if args.installed:
        ours.use_installed()
    linears(args)
    convs(args)


if __name__ == "__main__":
    main()
