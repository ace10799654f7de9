"""Writes the tables of measured speed into README.md and docs from bench/results.

    python -m bench.report

Every figure between the markers comes from the committed JSON; a figure without its measurement
says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import report_engine, report_lowbit
from bench.report_claims import ROOT, Claim, Goal, load, table

DOCS = ("README.md", "docs/benchmarks.md", "docs/low-bit.md")


def times(
    comparison: str, case: str, side: str, goal: float | None = None, note: str = ""
) -> Claim:
    """How many times `side` takes as long as effinfer."""
    text = f"{{:.3g}}x {side}{note}"
    return Claim(text, lambda: load(comparison)[case]["ratio"][side]["median"], goal)


def ms(comparison: str, case: str, side: str = "effinfer") -> float:
    return load(comparison)[case]["ms"][side]["median"]


def prefill(model: str, tokens: int, threads: int = 1) -> str:
    return f"{model} prefill {tokens:4d}, threads={threads}"


def decode(model: str, rows: int, threads: int = 1) -> str:
    return f"{model} decode batch {rows}, threads={threads}"


def two_threads(model: str, tokens: int) -> Claim:
    def speedup() -> float:
        return ms("models", prefill(model, tokens)) / ms("models", prefill(model, tokens, 2))

    return Claim(f"{{:.2f}}x {model} {tokens}", speedup, 1.8)


def per_token_growth() -> float:
    """Percent by which a token of the 2048 prompt costs more than one of the 512 prompt."""
    long = ms("models", prefill("mamba-130m", 2048)) / 2048
    return (long / (ms("models", prefill("mamba-130m", 512)) / 512) - 1) * 100


def copy_fraction(residence: str) -> float:
    """The smallest percentage of the copy's bandwidth over widths and layouts."""
    ratios = [
        entry["ratio"]["memcpy"]["median"]
        for case, entry in load("ops_conv").items()
        if residence in case and case.endswith("threads=1")
    ]
    if not ratios:
        raise KeyError(residence)
    return min(ratios) * 100


def extra_memory(model: str, side: str = "effinfer") -> float:
    entry = load("memory")[f"{model} prefill 2048, threads=1"]
    return entry["mib"][side]["extra"] - entry["layer_activations_mib"]


def overhead(side: str) -> float:
    return ms("overhead", "rms_norm of 8 values, ms per 1000 calls", side)


def linear_claims() -> tuple[list[Claim], list[Claim], list[Claim]]:
    """Per shape: few rows against bandwidth, 512 rows f32 against torch and the FMA peak, bf16."""
    few, f32, bf16 = [], [], []
    for shape in ("768x3072", "1536x768", "2048x2048", "4096x4096"):

        def case(kind: str, rows: str, shape: str = shape) -> dict[str, Any]:
            return load("ops_linear")[f"linear {kind} {shape}, {rows}, threads=1"]

        def reached(entry: dict[str, Any], unit: str, ceiling: str) -> float:
            rate = entry["work"][unit] / entry["ms"]["effinfer"]["median"] * 1e3
            return rate / entry["ceilings"][ceiling]

        few += [
            Claim(
                f"{shape}: {{:.2f}} of read bandwidth",
                lambda c=case: reached(c("f32", "few rows"), "GB/s", "read_gbs"),
                0.9,
            ),
            Claim(
                "8 rows in {:.2f}x the time",
                lambda c=case: c("f32", "few rows")["ratio"]["effinfer, 8 rows"]["median"],
                at_most=1.35,
            ),
        ]
        f32 += [
            times(
                "ops_linear",
                f"linear f32 {shape}, 512 rows, threads=1",
                "torch",
                1.15,
                f" at {shape}",
            ),
            Claim(
                "{:.2f} of the FMA peak",
                lambda c=case: reached(c("f32", "512 rows"), "GFLOP/s", "fma_gflops"),
                0.85,
            ),
        ]
        bf16_case = f"linear bf16 {shape}, 512 rows, threads=1"
        bf16.append(times("ops_linear", bf16_case, "torch", 6, f" at {shape}"))
    return few, f32, bf16


def goals() -> list[Goal]:
    scan, ssd = "selective_scan D1536 N16 L512, threads=1", "ssd H24 P64 N128 L512, threads=1"
    few, f32, bf16 = linear_claims()
    mamba, mamba2 = "mamba-130m", "mamba2-130m"
    return [
        (
            "`selective_scan` with softplus, D and gate, D1536 N16 L512",
            "50x transformers, 80x mambapy, 15x ggml",
            [
                times("ops_scan", scan, "transformers", 50),
                times("ops_scan", scan, "mambapy", 80),
                times("ops_scan", scan, "ggml", 15),
            ],
        ),
        (
            "`ssd` H24 P64 N128 L512",
            "15x transformers, 3x ggml",
            [
                times("ops_scan", ssd, "transformers", 15),
                times("ops_scan", ssd, "ggml", 3),
                times("ops_scan", ssd, "vllm"),
            ],
        ),
        (
            "`causal_conv1d`, widths 2..8, any stride",
            "70 % of memcpy bandwidth; 15x transformers at D 8192 transposed",
            [
                Claim("{:.0f} % from DRAM", lambda: copy_fraction("dram"), 70),
                Claim("{:.0f} % from cache", lambda: copy_fraction("cache"), 70),
                times("ops_conv", "D8192 W4 L512 time-major dram, threads=1", "transformers", 15),
            ],
        ),
        (
            "Mamba-130M prefill 512 and 2048, f32",
            "5.5x transformers, 3.5x llama.cpp; 2048 within 5 % of 512 per token",
            [
                times("models", prefill(mamba, tokens), side, goal, f" at {tokens}")
                for tokens in (512, 2048)
                for side, goal in (("transformers", 5.5), ("llama.cpp", 3.5))
            ]
            + [Claim("2048 {:+.1f} % per token", per_token_growth, at_most=5)],
        ),
        (
            "Mamba-130M decode f32, batch 1 / batch 8",
            "1.9x transformers, 1.25x llama.cpp / 3x, 2.5x",
            [
                times("models", decode(mamba, 1), "transformers", 1.9, ", batch 1"),
                times("models", decode(mamba, 1), "llama.cpp", 1.25, ", batch 1"),
                times("models", decode(mamba, 8), "transformers", 3, ", batch 8"),
                times("models", decode(mamba, 8), "llama.cpp", 2.5, ", batch 8"),
            ],
        ),
        (
            "Mamba-2-130M prefill f32 (512, 2048)",
            "2.8x transformers, 1.8x llama.cpp",
            [
                times("models", prefill(mamba2, tokens), side, goal, f" at {tokens}")
                for tokens in (512, 2048)
                for side, goal in (("transformers", 2.8), ("llama.cpp", 1.8))
            ],
        ),
        (
            "`linear`, DRAM-resident weights: 1 row / 8 rows",
            "0.9 of the read bandwidth / at most 1.35x the time of 1 row",
            few,
        ),
        ("`linear` f32, 512 rows", "1.15x torch (MKL), 0.85 of the FMA peak", f32),
        ("`linear` bf16 weights, 512 rows, AVX2", "6x torch bf16", bf16),
        (
            "two threads over one, prefill",
            "1.8x",
            [two_threads(m, tokens) for m in (mamba, mamba2) for tokens in (512, 2048)],
        ),
        (
            "extra peak memory of a 2048-token prefill over weights and one layer's activations",
            "at most 64 MB",
            [
                Claim("{:.0f} MiB Mamba", lambda: extra_memory(mamba), at_most=64),
                Claim("{:.0f} MiB Mamba-2", lambda: extra_memory(mamba2), at_most=64),
                Claim("transformers {:.0f}", lambda: extra_memory(mamba, "transformers")),
                Claim("/ {:.0f} MiB", lambda: extra_memory(mamba2, "transformers")),
            ],
        ),
        (
            "op call: binding / through `torch.ops`",
            "at most 0.6 us / 5 us",
            [
                Claim("{:.2f} us", lambda: overhead("effinfer"), at_most=0.6),
                Claim("{:.2f} us", lambda: overhead("torch.ops.effinfer"), at_most=5),
            ],
        ),
    ]


def rewrite(path: Path, name: str, text: str) -> bool:
    """Replaces what stands between the markers of that name; True when the file has them."""
    begin, end = f"<!-- {name}:begin (python -m bench.report) -->", f"<!-- {name}:end -->"
    content = path.read_text()
    if begin not in content:
        return False
    head, _, rest = content.partition(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
    return True


def main() -> None:
    tables = {
        "speed": table(goals(), "figure (1 thread unless said)"),
        "low-bit": table(report_lowbit.goals(), "figure (the worst of both shapes)"),
        "engine": table(report_engine.goals(), "figure (float32)"),
    }
    for path in (ROOT / name for name in DOCS):
        for name, text in tables.items():
            if path.exists() and rewrite(path, name, text):
                print(f"{path.relative_to(ROOT)}: table {name!r} rewritten")
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
