"""The low-bit rows of the speed tables: each goal beside the worst of its measured cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.report_claims import Claim, Goal, load

SHAPES = ("N4096 K4096", "N11008 K4096")
MANY_ROWS = (8, 32, 128, 512)
Entry = dict[str, Any]


def cases(
    format: str, rows: tuple[int, ...], threads: int, comparison: str = "ops_lowbit"
) -> Iterator[Entry]:
    for shape in SHAPES:
        for count in rows:
            yield load(comparison)[f"{format} {shape}, {count} rows, threads={threads}"]


def ratio(entry: Entry, side: str) -> float:
    """Times of effinfer's time; over sides whose name begins so, the fastest."""
    found = [r["median"] for name, r in entry["ratio"].items() if name.startswith(side)]
    if not found:
        raise KeyError(side)
    return float(min(found))


def best_peer(entry: Entry) -> float:
    """The fastest side of all, torch's float32 left out."""
    return float(min(r["median"] for name, r in entry["ratio"].items() if name != "torch f32"))


def of_peak(entry: Entry) -> float:
    """GOPS over the f32 FMA peak of the same run and threads."""
    rate = entry["work"]["GOPS"] / entry["ms"]["effinfer"]["median"] * 1e3
    return float(rate / entry["ceilings"]["fma_gflops"])


def worst(
    text: str,
    value: Callable[[Entry], float],
    format: str,
    rows: tuple[int, ...],
    goal: float | tuple[float, float] | None = None,
    comparison: str = "ops_lowbit",
) -> list[Claim]:
    """The smallest value over shapes and rows, for 1 thread and for 2."""
    goals = goal if isinstance(goal, tuple) else (goal, goal)

    def over(threads: int) -> Callable[[], float]:
        return lambda: min(value(entry) for entry in cases(format, rows, threads, comparison))

    return [
        Claim(f"{{:.3g}}{text} ({threads}T)", over(threads), at_least)
        for threads, at_least in zip((1, 2), goals, strict=True)
    ]


def times(
    side: str, format: str, rows: tuple[int, ...], goal: float | tuple[float, float] | None = None
) -> list[Claim]:
    return worst(f"x {side}", lambda entry: ratio(entry, side), format, rows, goal)


def xnor() -> list[Claim]:
    def conv(threads: int) -> Callable[[], float]:
        def share() -> float:
            gemm = max(
                e["work"]["GOPS"] / e["ms"]["effinfer"]["median"]
                for e in cases("xnor", (512,), threads, "ops_binary")
            )
            found = [
                e["work"]["GOPS"] / e["ms"]["effinfer"]["median"]
                for name, e in load("ops_binary").items()
                if name.startswith("conv 3x3") and name.endswith(f"threads={threads}")
            ]
            if not found:
                raise KeyError("conv 3x3")
            return 100 * min(found) / gemm

        return share

    return [
        *worst("x torch f32", lambda e: ratio(e, "torch f32"), "xnor", (512,), 10, "ops_binary"),
        *(Claim(f"conv {{:.0f}} % ({t}T)", conv(t), 70) for t in (1, 2)),
    ]


def bitnet(side: str, threads: int) -> Claim:
    case = f"BitNet 2B's shape, 6 layers, decode, threads={threads}"
    return Claim(
        f"{{:.0f}}x {side} ({threads}T)",
        lambda: load("bitnet")[case]["ratio"][side]["median"],
        100,
    )


def quantease() -> list[Claim]:
    def entry(channels: str) -> Entry:
        return load("quantizers")[f"int3 4096x4096, {channels} channels, 25 sweeps, threads=2"]

    def below_gptq(quantizer: str, channels: str) -> Claim:
        def percent() -> float:
            errors = entry(channels)["output_error"]
            return float(100 * (1 - errors[quantizer] / errors["gptq"]))

        goal = 25 if quantizer == "quantease" else None
        return Claim(f"{quantizer} {{:.0f}} % ({channels} channels)", percent, goal)

    return [
        Claim("{:.0f} s", lambda: entry("equal")["seconds"]["quantease"], at_most=120),
        *(below_gptq(q, c) for q in ("quantease", "gptq+cd") for c in ("equal", "unequal")),
    ]


def overhead() -> Claim:
    case = "LowBitLinear of 32 to 16, ms per 1000 calls"
    return Claim("{:.1f} us", lambda: load("overhead")[case]["ms"]["effinfer"]["median"], at_most=6)


def goals() -> list[Goal]:
    w4, f32_w4, dense = "w4a8 g128", "w4 f32 g128", "ternary 1.6"
    ternary_peers = ("bitnet.cpp I2_S", "ik iq2_bn")
    return [
        (
            "w4a8, groups of 128, 1 row",
            "1.7x the best peer; 8x torch f32 (13x)",
            [
                *worst("x the best peer", best_peer, w4, (1,), 1.7),
                *times("torch f32", w4, (1,), (8, 13)),
            ],
        ),
        (
            "w4a8, groups of 128, 8..512 rows",
            "2x ik_llama or 3x llama.cpp, ONNX Runtime and torch f32; 1.4x FBGEMM int8",
            [
                *times("ik", w4, MANY_ROWS, 2),
                *times("llama.cpp", w4, MANY_ROWS, 3),
                *times("ONNX Runtime", w4, MANY_ROWS, 3),
                *times("torch f32", w4, MANY_ROWS, 3),
                *times("FBGEMM int8", w4, MANY_ROWS, 1.4),
            ],
        ),
        *(
            (
                f"{name}: 8..512 rows / 1 row",
                "1.4x bitnet.cpp I2_S and ik iq2_bn / 1.4x llama.cpp tq2_0",
                [
                    *(c for side in ternary_peers for c in times(side, name, MANY_ROWS, 1.4)),
                    *times("llama.cpp tq2_0", name, (1,), 1.4),
                ],
            )
            for name in ("w2a8 g128", "ternary")
        ),
        (
            "ternary at 1.6 bits, 1 row",
            "1.4x of the f32 FMA peak in operations",
            worst("x the peak", of_peak, dense, (1,), 1.4),
        ),
        (
            "w3a8, 512 rows / 1 bit x int8, 1 row",
            "2x of the f32 FMA peak / 2x of it",
            [
                *worst("x", of_peak, "w3a8 g128", (512,), 2),
                *worst("x", of_peak, "binary x int8", (1,), 2),
            ],
        ),
        (
            "XNOR with channel scales, 512 rows / binary 3x3 convolutions",
            "10x torch f32 / 70 % of the XNOR rate",
            xnor(),
        ),
        (
            "w8a8, exact, 512 rows",
            "1.4x of the f32 FMA peak",
            worst("x", of_peak, "w8a8", (512,), 1.4),
        ),
        (
            "w4 with float32 activations: 1 row / 512 rows",
            "4x torch f32 / 0.9x",
            [*times("torch f32", f32_w4, (1,), 4), *times("torch f32", f32_w4, (512,), 0.9)],
        ),
        (
            "transformers' BitNet model, decode",
            "100x its own BitLinear",
            [bitnet(f"transformers{how}", t) for how in ("", ", not compiled") for t in (1, 2)],
        ),
        (
            "QuantEase 4096 x 4096, 25 sweeps, 2 threads",
            "at most 120 s; squared error 25 % under GPTQ's",
            quantease(),
        ),
        ("Python overhead of a patched Linear", "at most 6 us", [overhead()]),
    ]
