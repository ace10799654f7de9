"""What the NEON kernels' hot loops should reach on Neoverse V1 and V2 (N1), by llvm-mca's model.

A model's figure, not a measurement: llvm-mca knows the core's ports and latencies, and takes every
load for an L1 hit and every branch for foreseen. Build the neon preset first.

Usage: python tools/mca.py [--build build/neon] [--output bench/results/llvm_mca_neon.json]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PIPES = {"neoverse-n1": 2, "neoverse-v1": 4, "neoverse-v2": 4}  # 128-bit, of any arithmetic
V_CORES = ("neoverse-v1", "neoverse-v2")
ITERATIONS = 200


@dataclass(frozen=True)
class Hot:
    """A hot loop: the innermost loop with the most vector arithmetic in one function."""

    op: str
    function: str  # regular expression over the function's demangled name
    what: str  # one iteration of the loop
    file: str = "neon"
    cores: tuple[str, ...] = V_CORES


HOT = (
    Hot("rms_norm", r"normalise_row<float, float, float>", "sum of squares, 16 elements"),
    Hot("layer_norm", r"normalise_row<float, float, float>", "variance or scale, 16 elements"),
    Hot("selective_scan", r"advance_all<.*Form\{true\}>", "4 states of 4 channels, one token"),
    Hot("selective_scan", r"advance_all<.*Form\{\}>", "the same with unbounded exponents"),
    Hot("selective_scan_lti", r"\bscan_unit\(", "complex states of 4 channels, one token"),
    Hot("causal_conv1d", r"convolve_rows<4>", "width 4 with silu, 4 rows of 4 channels"),
    Hot("ssd", r"\bscores_tile\(", "6x16 tile of C B^T, 2 states"),
    Hot("ssd", r"\bstate_tile\(", "6x16 tile of the state, 2 tokens"),
    Hot("ssd", r"\boutput_tile\(", "6x16 tile of the output, 2 terms"),
    Hot("linear", r"tile<6, 1, 0, float>", "6 rows x 16 outputs, f32, 4 terms"),
    Hot("linear", r"tile<6, 1, 4, effinfer::bf16>", "6 rows x 16 outputs, bf16 weights, 4 terms"),
    Hot("linear", r"tile<1, 4, 0, float>", "1 row x 64 outputs, f32, 4 terms"),
    Hot("linear", r"tile<1, 4, 0, effinfer::bf16>", "1 row x 64 outputs, bf16 weights, 4 terms"),
    Hot("binary_linear", r"binary_count_neon|count_tile<4, 2>", "4 rows x 64 outputs, cnt, 8 k"),
    *(
        Hot("lowbit_linear", rf"dot_row<.*LowbitFormat\){code}>", f"1 row, {what}", file, cores)
        for file, product, cores in (
            ("neon_dotprod", "sdot", tuple(PIPES)),
            ("neon", "smlal", ("neoverse-n1",)),
        )
        for code, what in (
            (0, f"int8 by {product}, 4 k"),
            (1, f"int4 by {product}, 8 k"),
            (2, f"int3 by {product}, 32 k"),
            (3, f"int2 by {product}, 16 k"),
            (5, f"ternary at 1.67 bits by {product}, 48 k"),
            (6, f"binary by {product}, 32 k"),
        )
    ),
    Hot("lowbit_linear", r"tile<6>", "6 rows, smmla, 16 k", "neon_i8mm"),
    Hot("lowbit_linear", r"tile<4>", "4 rows, sdot, 16 k", "neon_dotprod", tuple(PIPES)),
    Hot("lowbit_linear", r"tile<2>", "2 rows, smlal, 8 k", "neon", ("neoverse-n1",)),
)

FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
BRANCH = re.compile(r"^(b|b\.\w+|bc\.\w+|cbz|cbnz|tbz|tbnz)$")
TARGET = re.compile(r"0x([0-9a-f]+) <")
FUSED = re.compile(r"^f(mla|mls|madd|msub|nmadd|nmsub)$")
PLAIN = re.compile(r"^f(add|sub|mul|nmul|div|sqrt)$")
# cnt: after eor, 128 products of signs and their sums.
PRODUCTS = {
    "cnt": 256,
    "smmla": 64,
    "sdot": 32,
    **dict.fromkeys(("smull", "smull2", "smlal", "smlal2"), 16),
}
LANES = re.compile(r"^v\d+\.(\d+)[hsd]")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        found = TARGET.search(self.operands) if BRANCH.match(self.name) else None
        return int(found[1], 16) if found else None

    @property
    def ops(self) -> int:
        """Additions and multiplications."""
        if self.name in PRODUCTS:
            return PRODUCTS[self.name]
        vector = LANES.match(self.operands)
        lanes = int(vector[1]) if vector else 1
        if FUSED.match(self.name):
            return 2 * lanes
        return lanes if PLAIN.match(self.name) else 0

    @property
    def text(self) -> str:
        return f"{self.name} {re.sub(r' <.*>', '', self.operands)}"


def functions(object_file: Path) -> dict[str, list[Instruction]]:
    listing = subprocess.run(
        [tool("llvm-objdump"), "-d", "-C", "--no-show-raw-insn", str(object_file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, list[Instruction]] = {}
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            body = found.setdefault(match[2], [])
        elif match := INSTRUCTION.match(line):
            body.append(Instruction(int(match[1], 16), match[2], match[3].split("//")[0].strip()))
    return found


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """From the target of a backward branch to the branch, no other such pair between."""
    spans = [
        (one.target, one.address)
        for one in body
        if one.target is not None and body[0].address <= one.target <= one.address
    ]
    return [
        [one for one in body if begin <= one.address <= end]
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]


def tool(name: str) -> str:
    found = shutil.which(f"{name}-19") or shutil.which(name)
    if found is None:
        sys.exit(f"tools/mca.py needs {name} (Debian's llvm-19)")
    return found


def analyse(loop: list[Instruction], core: str) -> dict[str, object]:
    report = subprocess.run(
        [
            tool("llvm-mca"),
            "-mtriple=aarch64",
            f"-mcpu={core}",
            f"--iterations={ITERATIONS}",
            "--bottleneck-analysis",
        ],
        input="\n".join(one.text for one in loop),
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    def number(label: str) -> float:
        found = re.search(rf"^{label}:\s+([\d.]+)", report, re.MULTILINE)
        assert found is not None, f"llvm-mca's report has no {label!r}"
        return float(found[1])

    cycles = number("Total Cycles") / ITERATIONS
    ops = sum(one.ops for one in loop)
    peak = PIPES[core] * max(one.ops for one in loop)  # nothing else in any pipe
    return {
        "cycles_per_iteration": round(cycles, 2),
        "ipc": number("IPC"),
        "ops_per_cycle": round(ops / cycles, 2),
        "fraction_of_peak": round(ops / cycles / peak, 3),
        "bottleneck": bottleneck(report),
    }


def bottleneck(report: str) -> str:
    """The largest cause of back pressure, with the share of cycles it was seen in."""
    causes = {
        "ports": r"Resource Pressure\s+\[ ([\d.]+)% \]",
        "dependencies": r"Data Dependencies:\s+\[ ([\d.]+)% \]",
    }
    shares = {
        name: float(found[1]) for name, text in causes.items() if (found := re.search(text, report))
    }
    if not shares or max(shares.values()) == 0:
        return "dispatch width"
    worst = max(shares, key=lambda name: shares[name])
    if worst == "ports":
        units = re.findall(r"^\s+- (\w+)\s+\[ ([\d.]+)% \]", report, re.MULTILINE)
        named = sorted(units, key=lambda unit: -float(unit[1]))[:4]
        worst += f" ({', '.join(name for name, _ in named)})"
    return f"{worst}, {max(shares.values()):.0f} % of cycles"


def hottest(hot: Hot, build: Path) -> tuple[str, list[Instruction]]:
    object_file = build / f"csrc/CMakeFiles/effinfer_core.dir/ops/{hot.op}/{hot.file}.cpp.o"
    candidates = [
        (name, loop)
        for name, body in functions(object_file).items()
        if re.search(hot.function, name)
        for loop in innermost_loops(body)
    ]
    if not candidates:
        sys.exit(f"{object_file}: no loop in a function that matches {hot.function!r}")
    return max(candidates, key=lambda candidate: sum(one.ops for one in candidate[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--build", type=Path, default=Path("build/neon"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/llvm_mca_neon.json"))
    options = parser.parse_args()
    rows = []
    for hot in HOT:
        name, loop = hottest(hot, options.build)
        rows.append(
            {
                "op": hot.op,
                "function": name.replace("(anonymous namespace)::", "").replace("effinfer::", ""),
                "iteration": hot.what,
                "instructions": len(loop),
                "ops_per_iteration": sum(one.ops for one in loop),
                "branches_inside": sum(one.target is not None for one in loop[:-1]),
                "file": f"{hot.file}.cpp",
                "cores": {core: analyse(loop, core) for core in hot.cores},
            }
        )
    version = subprocess.run([tool("llvm-mca"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"LLVM version (\S+)", version)
    result = {
        "kind": "llvm-mca's model, not a measurement: every load an L1 hit, no branch missed",
        "llvm": found[1] if found else "unknown",
        "peak": "the loop's widest operation in every 128-bit pipe of the core",
        "pipes": PIPES,
        "loops": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result["kind"], rows)


def show(kind: object, rows: list[dict[str, object]]) -> None:
    print(kind)
    print(f"{'loop':<58} {'core':<12} {'cycles':>7} {'IPC':>5} {'ops/cycle':>11}  bottleneck")
    for row in rows:
        cores = row["cores"]
        assert isinstance(cores, dict)
        for core, figures in cores.items():
            print(
                f"{row['op']}: {row['iteration']}".ljust(58),
                f"{core:<12} {figures['cycles_per_iteration']:7.2f} {figures['ipc']:5.2f}",
                f"{figures['ops_per_cycle']:5.1f} ({figures['fraction_of_peak']:4.0%})",
                f" {figures['bottleneck']}",
            )


if __name__ == "__main__":
    main()
