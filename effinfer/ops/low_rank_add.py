"""What every row's own low-rank matrices add to a product, many adapters in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, inference_only, public

PANEL = 16  # outputs side by side in a packed up matrix


def pack_low_rank(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """``down``, ``up`` and ``parts`` as ``low_rank_add`` takes them.

    Args:
        factors: of 1 to 4 linears side by side: ``A (G, rank, K)`` and ``B (G, N, rank)`` for each
            of G groups, in one dtype.
    """
    ups, parts = [], []
    for a, b in factors:
        groups, outputs, rank = b.shape
        padded = F.pad(b, (0, 0, 0, -outputs % PANEL))
        panels = padded.view(groups, padded.shape[1] // PANEL, PANEL, rank)
        ups.append(panels.transpose(2, 3).flatten(1))
        parts += [outputs, a.shape[1]]
    return torch.cat([a for a, _ in factors], 1).contiguous(), torch.cat(ups, 1), tuple(parts)


def _unpacked(up: torch.Tensor, parts: Sequence[int]) -> list[torch.Tensor]:
    """``B (G, N, rank)`` of every part."""
    found, start = [], 0
    for outputs, rank in zip(parts[::2], parts[1::2], strict=True):
        panels = -(-outputs // PANEL)
        here = up[:, start : start + panels * PANEL * rank]
        start += here.shape[1]
        lines = here.view(len(up), panels, rank, PANEL).transpose(2, 3)
        found.append(lines.reshape(len(up), panels * PANEL, rank)[:, :outputs])
    return found


def _reference(
    y: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    parts: Sequence[int],
) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = index.long()
    low = torch.split(down.to(wide)[groups] @ x.to(wide)[:, :, None], list(parts[1::2]), 1)
    pairs = zip(_unpacked(up.to(wide), parts), low, strict=True)
    added = torch.cat([(b[groups] @ part)[:, :, 0] for b, part in pairs], 1)
    if bias is not None:
        added = added + bias.to(wide)[groups]
    y.copy_((y.to(wide) + added).to(y.dtype))


def _fake() -> None:
    return None


def _run(
    y: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    parts: Sequence[int],
) -> None:
    inference_only("low_rank_add", y, x)
    native(y).low_rank_add(x, index, down, up, bias, parts, y)


_OP = Op(
    "low_rank_add",
    "(Tensor(a!) y, Tensor x, Tensor index, Tensor down, Tensor up, Tensor? bias, int[] parts)"
    " -> ()",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def low_rank_add(
    y: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parts: Sequence[int],
) -> None:
    """Add ``B_g A_g x + bias_g`` to every row of ``y``, in place, with the row's own g = ``index``.

    The batched form of low-rank adapters (LoRA, arXiv 2106.09685) over requests that use different
    ones (Punica, arXiv 2310.18547); here, over rows at different loops of a recursive model. Rows
    of one group should lie together: they then share the reading of its matrices.

    Args:
        y: ``(rows, N)``, float32, bfloat16 or float16: outputs of 1 to 4 linears side by side.
        x: ``(rows, K)`` in ``y``'s dtype; evenly spaced rows, like ``y``'s.
        index: int32 ``(rows,)``, each row's group, in ``0 .. G - 1``.
        down, up, parts: as ``pack_low_rank`` gives them.
        bias: float32 ``(G, N)`` or None.

    A row's bits depend on that row and its group alone. Error bound of what is added: relative L2
    against float64 <= 2e-6 in float32; then y is rounded to its type once.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index that does not fit.
        RuntimeError: an input requires grad.
    """
    _OP(y, x, index, down, up, bias, parts)
