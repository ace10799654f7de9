"""What this machine can do at most, from effinfer-bench, measured beside the comparison."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


def bench_binary() -> str | None:
    """effinfer-bench: $EFFINFER_BENCH, the installed one, or a build in this tree."""
    built = sorted((Path(__file__).parents[2] / "build").glob("**/effinfer-bench"))
    candidates = [
        os.environ.get("EFFINFER_BENCH"),
        shutil.which("effinfer-bench"),
        *map(str, built),
    ]
    return next((path for path in candidates if path and Path(path).exists()), None)


def ceilings(threads: int) -> dict[str, Any]:
    """Measured now: best read bandwidth over stream counts, and the peaks of f32 FMAs, of int8
    products, and of int8's with codes of at most 4 bits."""
    binary = bench_binary()
    if binary is None:
        return {"absent": "effinfer-bench is neither installed nor built"}
    command = [binary, "--ceilings", "--json", "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)["ceilings"][0]
    by_streams = measured["read_gbs"]
    return {
        "read_gbs": max(by_streams.values()),
        "read_gbs_by_streams": by_streams,
        "fma_gflops": measured["fma_gflops"],
        "int8_dot_gops": measured["int8_dot_gops"],
        "code_dot_gops": measured["code_dot_gops"],
    }
