"""The engine's rows of the speed tables: each goal beside what was measured on 1 and 2 threads."""

from __future__ import annotations

from bench import report_depth
from bench.report_claims import Claim, Goal, load

THREADS = (1, 2)


def times(
    comparison: str, case: str, side: str, text: str, at_least: float | None = None
) -> list[Claim]:
    """How many times `side` takes as long as effinfer, in the case of each number of threads."""
    return [
        Claim(
            f"{{:.3g}}x {text} ({threads}T)",
            lambda t=threads: load(comparison)[f"{case}, threads={t}"]["ratio"][side]["median"],
            at_least,
        )
        for threads in THREADS
    ]


def dispatch() -> list[Claim]:
    return [
        Claim(
            f"{{:.0f}} us {kind}",
            lambda k=kind: load("engine_step")[f"{k}, 64 rows, ms per 100 launches"]["dispatch_us"],
            at_most=50,
        )
        for kind in ("greedy", "temperature", "top-k and top-p")
    ]


def more_rows() -> list[Claim]:
    def over_one_row(threads: int) -> float:
        case = load("engine_step_rows")[f"51 M-parameter block, threads={threads}"]
        return float(case["ratio"]["effinfer, 8 rows"]["median"])

    return [
        Claim(f"{{:.2f}}x ({threads}T)", lambda t=threads: over_one_row(t), at_most=1.35)
        for threads in THREADS
    ]


def goals() -> list[Goal]:
    mixed = "mixed, llama 8 x 512"
    return [
        ("scheduler and dispatch of a launch of 64 rows", "at most 50 us", dispatch()),
        (
            "tokens a second, 8-layer 512-wide llama, 64 requests of mixed lengths",
            "2.5x transformers' continuous batching, 1.2x llama.cpp's slots",
            [
                *times("engine_throughput", mixed, "transformers", "transformers", 2.5),
                *times("engine_throughput", mixed, "llama.cpp", "llama.cpp", 1.2),
            ],
        ),
        ("a launch of 8 rows over one of 1, 51 M-parameter block", "at most 1.35x", more_rows()),
        (
            "16 streams over the same engine one request at a time",
            "5x",
            [
                claim
                for model in ("Mamba", "hybrid")
                for claim in times(
                    "engine_streams", f"{model}, 16 streams", "one at a time", model, 5
                )
            ],
        ),
        *report_depth.goals(),
    ]
