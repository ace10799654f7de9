#!/usr/bin/env python3
"""Checks what the files compiled with instruction-set flags give to the linker.

Usage: tools/check_isa_objects.py BUILD_DIR

An inline function compiled with -mavx2 may be the copy that the linker keeps for the whole program,
and crash an older CPU. So an object named after an instruction set may define functions that end in
that set's name (`rms_norm_avx2`) and nothing else: no weak symbol, no data.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ISAS = ("avx2", "avx512", "avx512_vnni", "neon", "neon_dotprod", "neon_i8mm")


def problems(path: Path) -> list[str]:
    """What is wrong with the symbols that the object offers to other objects."""
    isa = path.name.removesuffix(".cpp.o")
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if line]
    own = re.compile(rf"effinfer::(\w+::)*\w*{isa}\(")
    found = [f"{kind} {name}" for kind, name in symbols if kind != "T" or not own.match(name)]
    return found or ([] if symbols else [f"no function named after {isa}"])


def main(build: Path) -> int:
    objects = sorted(
        path
        for isa in ISAS
        for path in build.glob(f"csrc/CMakeFiles/effinfer_*.dir/*/*/{isa}.cpp.o")
    )
    if not objects:
        print(f"no objects of instruction sets under {build}: build it first", file=sys.stderr)
        return 2
    bad = {path: found for path in objects if (found := problems(path))}
    for path, found in bad.items():
        print(f"{path.parent.name}/{path.name}:", *found, sep="\n  ")
    print(f"{len(objects)} objects of instruction sets, {len(bad)} with foreign symbols")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
