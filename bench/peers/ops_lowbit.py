"""Low-bit linears beside every peer: 1 row from DRAM and 8 to 512 rows, 8 bits to 1.

Peers quantize the same weight in their own nearest format. `--installed` measures the installed
effinfer instead of this tree's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from bench.peers import lowbit_ours as ours
from bench.peers import lowbit_sides as peers
from bench.peers import ort
from bench.peers.ceilings import ceilings
from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.lowbit_case import Case, ends

SHAPES = ((4096, 4096), (11008, 4096))  # (outputs, inputs)
ROWS = (1, 8, 32, 128, 512)
SAMPLE_S, SETTLE_S = 1e-2, 5e-3
BOUND = 3e-2  # 7-bit activations a tensor and bfloat16 among the peers; all errors are recorded

SideFactory = Callable[[Case], Side]


def on_ternary(factory: SideFactory) -> SideFactory:
    """The same on ternary weights: the nearest format of peers that have no other of 2 bits."""
    return lambda case: factory(replace(case, kind="ternary"))


F32: dict[str, SideFactory] = {"torch f32": peers.torch_f32}
ORT_INT8 = partial(ort.side, accuracy=4)
TERNARY: dict[str, SideFactory] = {
    "llama.cpp tq2_0": peers.llama("tq2_0"),
    "ik iq2_bn": peers.ik("iq2_bn"),
    "ik iq2_bn_r4": peers.ik("iq2_bn_r4"),
    "bitnet.cpp I2_S": peers.bitnet,
}


@dataclass(frozen=True)
class Format:
    """One kind of product: our side, and the peers' nearest formats."""

    kind: str  # of weight
    ours: SideFactory
    peers: Mapping[str, SideFactory]


FORMATS = {
    "w8a8": Format(
        "plain",
        partial(ours.linear, format="int8", group=1 << 30),
        {
            **F32,
            "FBGEMM int8": peers.fbgemm,
            "ONNX Runtime w8": partial(ORT_INT8, bits=8),
            "llama.cpp q8_0": peers.llama("q8_0"),
            "ik q8_0_r8": peers.ik("q8_0_r8"),
        },
    ),
    "w4a8 g128": Format(
        "plain",
        partial(ours.linear, format="int4"),
        {
            **F32,
            "FBGEMM int8": peers.fbgemm,
            "torch int4pack bf16": peers.int4pack,
            "ONNX Runtime w4": ORT_INT8,
            "llama.cpp q4_0": peers.llama("q4_0", repack=True),
            "llama.cpp q4_K": peers.llama("q4_K"),
            "ik q4_0_r8": peers.ik("q4_0_r8"),
            "ik q4_K": peers.ik("q4_K"),
            "T-MAC": peers.tmac,
        },
    ),
    "w3a8 g128": Format(
        "plain",
        partial(ours.linear, format="int3"),
        {**F32, "llama.cpp q3_K": peers.llama("q3_K"), "ik q3_K_r4": peers.ik("q3_K_r4")},
    ),
    "w2a8 g128": Format(
        "plain",
        partial(ours.linear, format="int2"),
        {
            **F32,
            "llama.cpp q2_K": peers.llama("q2_K"),
            "T-MAC": peers.tmac,
            **{name: on_ternary(factory) for name, factory in TERNARY.items()},
        },
    ),
    "ternary": Format(
        "ternary", partial(ours.linear, format="ternary", group=1 << 30), F32 | TERNARY
    ),
    "ternary 1.6": Format(
        "ternary",
        partial(ours.linear, format="ternary_dense", group=1 << 30),
        {**F32, "llama.cpp tq1_0": peers.llama("tq1_0"), "ik iq1_bn": peers.ik("iq1_bn")},
    ),
    "binary x int8": Format(
        "binary",
        partial(ours.linear, format="binary"),
        {**F32, "llama.cpp q1_0": peers.llama("q1_0"), "T-MAC": peers.tmac},
    ),
    "w4 f32 g128": Format(
        "plain",
        partial(ours.linear, format="int4", activations="f32"),
        {
            **F32,
            "torch int4pack bf16": peers.int4pack,
            "ONNX Runtime w4 f32": partial(ort.side, accuracy=0),
        },
    ),
}


def compare(name: str, case: Case, args: argparse.Namespace) -> None:
    found = FORMATS[name]
    sides = {OURS: found.ours, **found.peers}
    measure(
        "ops_lowbit",
        f"{name} N{case.outputs} K{case.inputs}, {case.rows} rows, threads={case.threads}",
        {side: partial(factory, case) for side, factory in sides.items()},
        args,
        bound=BOUND,
        part=ends,
        unit={"GOPS": 2 * case.rows * case.outputs * case.inputs / 1e9},
        facts=lambda: {"ceilings": ceilings(args.threads), "effinfer": ours.build("lowbit_linear")},
        sample_s=SAMPLE_S,
        settle_s=SETTLE_S,
    )


def main() -> None:
    args = arguments(__doc__, installed=ours.INSTALLED)
    if args.installed:
        ours.use_installed()
    for outputs, inputs in SHAPES:
        for name, found in FORMATS.items():
            for rows in ROWS:
                compare(name, Case(found.kind, outputs, inputs, rows, args.threads), args)


if __name__ == "__main__":
    main()
