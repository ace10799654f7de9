"""Draws docs/speed.png from bench/results: speed over stock transformers, 1 thread.

python -m bench.plot
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
SIDES = {"transformers": "#b0b0b0", "llama.cpp": "#6a9bc3", "effinfer": "#d1495b"}
GROUPS = {
    "Mamba-130M\nprefill 512": ("models", "mamba-130m prefill  512, threads=1"),
    "Mamba-130M\nprefill 2048": ("models", "mamba-130m prefill 2048, threads=1"),
    "Mamba-130M\ndecode": ("models", "mamba-130m decode batch 1, threads=1"),
    "Mamba-130M\ndecode, batch 8": ("models", "mamba-130m decode batch 8, threads=1"),
    "Mamba-2-130M\nprefill 512": ("models", "mamba2-130m prefill  512, threads=1"),
    "Mamba-2-130M\ndecode": ("models", "mamba2-130m decode batch 1, threads=1"),
    "Mamba-2-130M\ndecode, batch 8": ("models", "mamba2-130m decode batch 8, threads=1"),
    "engine: 64 requests,\nllama of 8 x 512": (
        "engine_throughput",
        "mixed, llama 8 x 512, threads=1",
    ),
}


def main() -> None:
    results = {
        name: json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
        for name in ("models", "engine_throughput")
    }
    measured = {
        label: results[name]["cases"][case]
        for label, (name, case) in GROUPS.items()
        if case in results[name]["cases"]
    }
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    width = 0.8 / len(SIDES)
    for place, (side, colour) in enumerate(SIDES.items()):
        for group, entry in enumerate(measured.values()):
            rates = {
                name: entry["work"]["tok/s"] / spread["median"] * 1e3
                for name, spread in entry["ms"].items()
            }
            height = rates[side] / rates["transformers"]
            at = group + (place - 1) * width
            axes.bar(at, height, width * 0.92, color=colour, label=side if group == 0 else None)
            axes.text(at, height, f"{rates[side]:.0f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(measured)), list(measured), fontsize=8.5)
    axes.set_ylabel("speed over transformers")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=len(SIDES), loc="outside lower center")
    machine = results["models"]["machine"]
    cpu, isa = machine["cpu"], machine["isa"]
    best = "AVX-512" if "avx512f" in isa else "AVX2"
    axes.set_title(f"float32, 1 thread, {cpu} ({best}); tokens/s above the bars", fontsize=9.5)
    figure.savefig(ROOT / "docs" / "speed.png", dpi=150)


if __name__ == "__main__":
    main()
