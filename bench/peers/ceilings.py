"""What this machine can do at most, from effinfer-bench, measured beside the comparison."""

from __future__ import annotations

import functools
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


@functools.cache
def ceilings(threads: int) -> dict[str, Any]:
    """effinfer-bench's own JSON; a comparison without it says so instead of guessing."""
    binary = bench_binary()
    if binary is None:
        return {"absent": "effinfer-bench is neither installed nor built"}
    command = [binary, "--ceilings", "--json", "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
