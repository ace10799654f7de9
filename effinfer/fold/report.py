"""What a fold changed, and what it refused and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Folded:
    """A scale that moved from ``source`` into ``targets``, or a norm that changed its kind.

    ``scale`` and ``zero`` are those of the per-tensor quantizer that now fits the source's output,
    where the fold made one.
    """

    source: str
    targets: tuple[str, ...]
    scale: float | None = None
    zero: int | None = None


@dataclass(frozen=True)
class Refused:
    """A place where the fold would not be exact, with every reason."""

    source: str
    targets: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass
class FoldReport:
    """The outcome of a fold; prints as a list."""

    fold: str
    folded: list[Folded] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.fold}: {len(self.folded)} folded, {len(self.refused)} refused"]
        lines += [f"  folded   {f.source} -> {', '.join(f.targets)}" for f in self.folded]
        lines += [
            f"  refused  {r.source} -> {', '.join(r.targets)}: {'; '.join(r.reasons)}"
            for r in self.refused
        ]
        return "\n".join(lines)
