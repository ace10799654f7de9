"""A measured value and the bound it has to keep, as the tables show them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MISSING = "not measured"

Cases = dict[str, dict[str, Any]]


@functools.cache
def load(comparison: str) -> Cases:
    path = RESULTS / f"{comparison}.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


@dataclass(frozen=True)
class Claim:
    """One measured value and the bound it has to keep."""

    text: str  # shows the value, e.g. "{:.0f}x transformers"
    value: Callable[[], float]
    at_least: float | None = None
    at_most: float | None = None

    def show(self) -> str:
        try:
            value = self.value()
        except KeyError:
            return MISSING
        low = self.at_least is not None and value < self.at_least
        high = self.at_most is not None and value > self.at_most
        return self.text.format(value) + (" (**short**)" if low or high else "")


Goal = tuple[str, str, list[Claim]]  # figure, goal in words, what was measured


def table(goals: list[Goal], first_column: str) -> str:
    lines = [f"| {first_column} | goal | measured |", "|---|---|---|"]
    for figure, goal, claims in goals:
        shown = [claim.show() for claim in claims]
        if set(shown) == {MISSING}:
            shown = [MISSING]
        lines.append(f"| {figure} | {goal} | {'; '.join(shown)} |")
    return "\n".join(lines)
