"""What one loop of a recursive model adds to a tied product: low-rank terms and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effinfer.engine.decoder_model import Addition
from effinfer.ops.linear import pack_linear


@dataclass(frozen=True)
class LoopAddition:
    """``x -> B A x + bias`` for linears side by side; ``A`` and ``B`` are packed, or None."""

    down: torch.Tensor | None
    up: torch.Tensor | None
    bias: torch.Tensor | None
    rank: int
    out_features: int


def additions(parts: Sequence[Addition | None], widths: Sequence[int]) -> LoopAddition | None:
    """One addition for linears side by side, of ``widths`` outputs; None where nothing is added."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    biases = [
        torch.zeros(width) if part is None or part.bias is None else part.bias.float()
        for part, width in zip(parts, widths, strict=True)
    ]
    bias = None if all(part.bias is None for part in given) else torch.cat(biases)
    lows = [part.lora_A for part in given if part.lora_A is not None]
    if not lows:
        return LoopAddition(None, None, bias, 0, sum(widths))
    # Every linear's terms in its own rows and columns: one product for all of them.
    blocks = [
        lows[0].new_empty(width, 0) if part is None or part.lora_B is None else part.lora_B
        for part, width in zip(parts, widths, strict=True)
    ]
    low = torch.cat(lows)
    high: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return LoopAddition(pack_linear(low), pack_linear(high), bias, len(low), sum(widths))


def add_up(
    lib: Any, addition: LoopAddition | None, x: torch.Tensor, out: torch.Tensor, low: torch.Tensor
) -> None:
    """Add to ``out`` what the loop adds for ``x``; ``low`` is room for the low-rank product."""
    if addition is None:
        return
    if addition.down is None:
        assert addition.bias is not None
        out.add_(addition.bias)
        return
    if low.shape[1] != addition.rank:
        low = low[:, : addition.rank]
    lib.linear(x, addition.down, addition.rank, None, "none", None, low)
    lib.linear(low, addition.up, addition.out_features, addition.bias, "none", out, out)
