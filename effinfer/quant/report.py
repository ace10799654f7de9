"""What quantizing did to each layer, and which layers it left alone and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer: ``error`` is the relative L2 error of its outputs on the calibration data, or of
    its weight where there was none (``measured`` says which)."""

    name: str
    format: str
    bits_per_weight: float
    method: str
    error: float
    measured: str  # "output" or "weight"
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SkippedLayer:
    """A linear layer that stayed in float."""

    name: str
    module: str
    reason: str


@dataclass
class QuantReport:
    """The outcome of ``effinfer.quantize_``; prints as a table.

    ``bits_per_weight`` counts scales and zero points. ``bytes_before`` and ``bytes_after`` are of
    the whole model, parameters and buffers, tied ones once.
    """

    model: str
    layers: list[QuantizedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.layers)} layers quantized "
            f"({self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after)"
        ]
        rows = [
            (
                layer.name,
                layer.format,
                layer.method,
                f"{layer.bits_per_weight:.2f} bits",
                f"{layer.measured} error {layer.error:.1e}",
                f"{layer.bytes_before / 1e3:,.0f} -> {layer.bytes_after / 1e3:,.0f} kB",
            )
            for layer in self.layers
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(6)]
        for row in rows:
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        counts = Counter((s.module, s.reason) for s in self.skipped)
        for (module, reason), count in counts.items():
            names = [s.name for s in self.skipped if (s.module, s.reason) == (module, reason)]
            others = "" if count == 1 else f" and {count - 1} more"
            lines.append(f"  in float: {names[0]}{others} ({module}): {reason}")
        return "\n".join(lines)
