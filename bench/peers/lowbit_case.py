"""One product of the low-bit comparison: its seeded weight and x, copies, and float64 truth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DRAM_BYTES = 192 << 20
FEW_ROWS = 8  # as many walk over copies
CHECKED = 8  # rows at either end that are compared with float64


@functools.lru_cache(maxsize=3)
def weight(kind: str, outputs: int, inputs: int) -> torch.Tensor:
    """Seeded float32 (outputs, inputs): `plain`, or of one scale times -1, 0, 1 or -1, 1."""
    torch.manual_seed(outputs + inputs)
    plain = torch.randn(outputs, inputs) * inputs**-0.5
    scale = plain.abs().mean()
    if kind == "ternary":
        return (plain / scale).round().clamp(-1, 1) * scale
    return plain.sign() * scale if kind == "binary" else plain


@dataclass(frozen=True)
class Case:
    """One product: x (rows, inputs) with a weight (outputs, inputs)."""

    kind: str  # of weight()
    outputs: int
    inputs: int
    rows: int
    threads: int

    def weight(self) -> torch.Tensor:
        return weight(self.kind, self.outputs, self.inputs)

    def x(self) -> torch.Tensor:
        torch.manual_seed(self.rows)
        return torch.randn(self.rows, self.inputs)

    def copies(self, weight_bytes: int) -> int:
        return 1 if self.rows > FEW_ROWS else DRAM_BYTES // weight_bytes + 1

    def turns(
        self, packed: Any, weight_bytes: int, copy: Callable[[Any], Any]
    ) -> Callable[[], Any]:
        """Gives one copy of a packed weight after another."""
        copies = [packed, *(copy(packed) for _ in range(self.copies(weight_bytes) - 1))]
        return itertools.cycle(copies).__next__

    def truth(self, dequantized: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x() if x is None else x
        return ends(x).double() @ dequantized.double().T


def ends(output: torch.Tensor) -> torch.Tensor:
    """The first and last rows, the ones that are checked."""
    return output if len(output) <= 2 * CHECKED else output[[*range(CHECKED), *range(-CHECKED, 0)]]
