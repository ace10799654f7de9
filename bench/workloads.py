"""Workloads for the engine's benchmarks, recorded as files so that every run serves the same one.

    python bench/workloads.py        # writes bench/workloads/*.json again, the same to the bit

A workload is a list of requests: when each arrives, the tokens of its prompt, and the tokens it
generates. Poisson arrivals are at one request a second on average: divide by the rate wanted.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "workloads"
SEED = 20261121
# Loops of four that tokens run, and how often: a mean of 1.73.
EXIT_SHARES = {1: 0.60, 2: 0.18, 3: 0.11, 4: 0.11}
# Positions that draft from the first of four loops on, by the loop that first says the right token
# and is not contradicted by deeper ones. Of a model of 0.7 M parameters, whose loops agree with the
# last for 0.716, 0.853 and 0.928 of all tokens; with a margin of at least 0.1, 0.49 of tokens draft
# and 0.905 of these are right at once.
SURE_DRAFTS = {0: 0.51, 1: 0.4435, 2: 0.0225, 3: 0.0122, 4: 0.0118}
ALL_DRAFTS = {1: 0.716, 2: 0.137, 3: 0.075, 4: 0.072}
NO_DRAFT = 0


@dataclass(frozen=True)
class Request:
    arrival: float
    prompt: int
    output: int


def load_workload(name: str) -> list[Request]:
    """The requests of ``bench/workloads/<name>.json``, in the order they arrive."""
    content = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return [Request(*request) for request in content["requests"]]


def load_exits() -> np.ndarray:
    """Recorded exits, (sequences, positions) int32: for ``effinfer.engine.policies.replay``."""
    content = json.loads((FOLDER / "exits.json").read_text("utf-8"))
    return np.array([[int(depth) for depth in row] for row in content["depths"]], dtype=np.int32)


def load_drafts(name: str) -> np.ndarray:
    """Recorded drafts "sure" or "all", (sequences, positions): NO_DRAFT, or the loop, from 1, that
    first says the right token."""
    content = json.loads((FOLDER / "drafts.json").read_text("utf-8"))
    return np.array([[int(kind) for kind in row] for row in content[name]], dtype=np.int32)


def lengths(
    generator: np.random.Generator, count: int, median: float, low: int, high: int
) -> list[int]:
    """Log-normal, as requests to language models are: most short, a few long."""
    drawn = np.exp(generator.normal(np.log(median), 0.8, count))
    return [int(length) for length in np.clip(np.round(drawn), low, high)]


def requests(generator: np.random.Generator, count: int, arrivals: np.ndarray) -> list[Request]:
    """Prompts of 4 to 256 tokens, outputs of 8 to 192: together under the carried models' 512."""
    prompts = lengths(generator, count, 48, 4, 256)
    outputs = lengths(generator, count, 48, 8, 192)
    times = [round(float(time), 4) for time in arrivals]
    return [Request(*parts) for parts in zip(times, prompts, outputs, strict=True)]


def shuffled(
    generator: np.random.Generator, shares: dict[int, float], sequences: int, positions: int
) -> list[str]:
    """Lines of digits: exactly the shares wanted, in random order."""
    total = sequences * positions
    counts = [round(share * total) for share in shares.values()]
    digits = np.repeat(list(shares), counts)
    assert len(digits) == total, "the shares must divide the number of tokens"
    rows = generator.permutation(digits).reshape(sequences, positions)
    return ["".join(map(str, row)) for row in rows]


def write(name: str, description: str, **content: object) -> None:
    """One line for each request or sequence, so that differences can be read."""
    fields = [f'"description": {json.dumps(description)}', f'"seed": {SEED}']
    for key, rows in content.items():
        lines = ",\n  ".join(json.dumps(row) for row in rows)  # type: ignore[attr-defined]
        fields.append(f'"{key}": [\n  {lines}\n ]')
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text("{\n " + ",\n ".join(fields) + "\n}\n", "utf-8")


def main() -> None:
    """Writes every workload."""
    generator = np.random.default_rng(SEED)
    together = requests(generator, 64, np.zeros(64))
    write(
        "mixed",
        "64 requests of mixed lengths, all there at the start",
        requests=[astuple(request) for request in together],
    )
    arrivals = np.cumsum(generator.exponential(1.0, 256))
    arriving = requests(generator, 256, arrivals / arrivals[-1] * 256)
    write(
        "poisson",
        "256 requests of mixed lengths; Poisson arrivals, one a second on average",
        requests=[astuple(request) for request in arriving],
    )
    write(
        "exits",
        "loops of four that each generated token runs: a mean of 1.73",
        depths=shuffled(generator, EXIT_SHARES, 64, 500),
    )
    write(
        "drafts",
        "for each token the loop of four that first drafts it right; 0: it is not drafted",
        sure=shuffled(generator, SURE_DRAFTS, 64, 500),
        all=shuffled(generator, ALL_DRAFTS, 64, 500),
    )


if __name__ == "__main__":
    main()
