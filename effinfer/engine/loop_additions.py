"""What the loops of a recursive model add to a tied product: low-rank terms and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effinfer.engine.decoder_model import Addition
from effinfer.ops.low_rank_add import pack_low_rank


class LoopAdditions:
    """``y += B A x + bias`` of every row's own loop, for linears side by side: one native call.

    Args:
        loops: for each loop, what it adds to each of the linears.
        widths: outputs of each of the linears.
        inputs: of all of them.
    """

    def __init__(
        self, loops: Sequence[Sequence[Addition | None]], widths: Sequence[int], inputs: int
    ) -> None:
        given = [part for loop in loops for part in loop if part is not None]
        lows = [part.lora_A for part in given if part.lora_A is not None]
        like = lows[0] if lows else torch.zeros(0)
        factors = [
            _factors([loop[i] for loop in loops], width, inputs, like)
            for i, width in enumerate(widths)
        ]
        self._down, self._up, self._parts = pack_low_rank(factors)
        biases = [
            torch.cat([_bias(part, width) for part, width in zip(loop, widths, strict=True)])
            for loop in loops
        ]
        self._bias = None if all(p.bias is None for p in given) else torch.stack(biases)

    def __call__(self, lib: Any, x: torch.Tensor, y: torch.Tensor, loops: torch.Tensor) -> None:
        """Add to ``y (rows, sum(widths))`` what loop ``loops[i]`` adds for row i of ``x``."""
        lib.low_rank_add(x, loops, self._down, self._up, self._bias, self._parts, y)


def loop_additions(
    loops: Sequence[Sequence[Addition | None]], widths: Sequence[int], inputs: int
) -> LoopAdditions | None:
    """As ``LoopAdditions``; None where no loop adds anything."""
    if all(part is None for loop in loops for part in loop):
        return None
    return LoopAdditions(loops, widths, inputs)


def _factors(
    parts: Sequence[Addition | None], outputs: int, inputs: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One linear's ``A (loops, rank, inputs)`` and ``B (loops, outputs, rank)``, zeros where a loop
    has a lower rank or none."""
    rank = max((len(p.lora_A) for p in parts if p is not None and p.lora_A is not None), default=0)
    down = like.new_zeros(len(parts), rank, inputs)
    up = like.new_zeros(len(parts), outputs, rank)
    for loop, part in enumerate(parts):
        if part is not None and part.lora_A is not None and part.lora_B is not None:
            down[loop, : len(part.lora_A)] = part.lora_A
            up[loop, :, : len(part.lora_A)] = part.lora_B
    return down, up


def _bias(part: Addition | None, width: int) -> torch.Tensor:
    return torch.zeros(width) if part is None or part.bias is None else part.bias.float()
