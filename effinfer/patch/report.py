"""What a patch did, and what it left alone and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """A module that now runs on effinfer."""

    name: str
    module: str
    replacement: str
    feature: str
    why: str


@dataclass(frozen=True)
class Skipped:
    """A module a rule knows but that was left stock, with every reason."""

    name: str
    module: str
    feature: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Fallback:
    """A module that computes on its stock code because no rule knows it."""

    name: str
    module: str
    reason: str


@dataclass
class PatchReport:
    """The outcome of ``effinfer.patch``; prints as a table.

    ``bytes_before`` and ``bytes_after`` count parameters and buffers, tied ones once. Packed weights
    are copies beside the parameters, so patching linears about doubles them.
    """

    model: str
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    dry_run: bool = False
    verified: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        if self.dry_run:
            state = "dry run, nothing changed"
        else:
            state = (
                f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after"
            )
        rows = [
            *_rows("replaced", ((r.module, f"{r.feature}: {r.why}") for r in self.replaced)),
            *_rows("skipped", ((s.module, "; ".join(s.reasons)) for s in self.skipped)),
            *_rows("stock", ((f.module, f.reason) for f in self.fallbacks)),
        ]
        lines = [f"{self.model}: {len(self.replaced)} modules replaced ({state})"]
        if self.verified is not None:
            lines[0] += f", outputs within {self.verified:.1e} of stock"
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for what, count, module, text in rows:
            cells = f"{what:<{widths[0]}}  {count:>{widths[1]}}  {module:<{widths[2]}}"
            lines.append(f"  {cells}  {text}")
        return "\n".join(lines)


def _rows(what: str, items: Iterable[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    counts = Counter(items)
    return [(what, str(n), module, text) for (module, text), n in counts.items()]
