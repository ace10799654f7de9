"""List the GPU targets inside a binary that nvcc linked, and fail where an expected one is missing.

cuobjdump is not always installed; the headers it reads are simple. A fat binary is a header
(magic, version, header bytes, body bytes) and entries (kind 1 = PTX, 2 = machine code), each with
its architecture at byte 28.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
KINDS = {1: "ptx", 2: "sm"}


def fat_binaries(image: bytes) -> Iterator[list[str]]:
    """The targets of each fat binary (one per compiled file) in ``image``."""
    start = image.find(MAGIC)
    while start >= 0:
        _, _, header, body = struct.unpack_from("<IHHQ", image, start)
        position, end = start + header, start + header + body
        targets = []
        while position < end:
            kind, _, entry_header, size = struct.unpack_from("<HHIQ", image, position)
            (architecture,) = struct.unpack_from("<I", image, position + 28)
            targets.append(f"{KINDS[kind]}_{architecture}")
            position += entry_header + size
        yield targets
        start = image.find(MAGIC, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--expect", default="", help="comma-separated, such as sm_80,ptx_120")
    arguments = parser.parse_args()
    found = list(fat_binaries(arguments.binary.read_bytes()))
    wanted = [target for target in arguments.expect.split(",") if target]
    for targets in found:
        missing = [target for target in wanted if target not in targets]
        if missing:
            sys.exit(f"{arguments.binary}: no {', '.join(missing)} (found {', '.join(targets)})")
    if not found:
        sys.exit(f"{arguments.binary}: no GPU code")
    print(f"{arguments.binary.name}: {len(found)} fat binaries, each with {', '.join(found[0])}")


if __name__ == "__main__":
    main()
