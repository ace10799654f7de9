"""The experts of a mixture: every row through its own few of them, each expert's weights read once."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public
from effinfer.ops.linear import PANEL, pack_linear, unpack_linear

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def pack_experts(weight: torch.Tensor) -> torch.Tensor:
    """Pack the experts' weights ``(E, N, K)`` for :func:`moe_experts`, one after the other.

    Returns:
        ``(E, ceil(N/16), K, 16)`` of ``weight``'s dtype; as many bytes where 16 divides N.

    Raises:
        ValueError, TypeError: a weight without three dimensions, or of another dtype than float32,
            bfloat16 and float16.
    """
    if weight.dim() != 3:
        raise ValueError(
            f"pack_experts: weight must have 3 dimensions, got shape {tuple(weight.shape)}"
        )
    experts, n, k = weight.shape
    packed = weight.detach().new_empty(experts, (n + PANEL - 1) // PANEL, k, PANEL)
    if packed.is_cpu and type(packed) is torch.Tensor and packed.numel():
        native(packed).advise_huge_pages(packed)
    for place, own in zip(packed, weight.detach(), strict=True):
        place.copy_(pack_linear(own))
    return packed


def unpack_experts(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The weights ``(E, N, K)`` that :func:`pack_experts` was given, to the bit."""
    weight = packed.new_empty(packed.shape[0], out_features, packed.shape[2])
    for place, own in zip(weight, packed, strict=True):
        place.copy_(unpack_linear(own, out_features)[0])
    return weight


def _activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"moe_experts: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def _reference(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    _check(activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    inner = down.shape[2]
    plain_up = unpack_experts(up, (1 + gated) * inner).to(wide)
    plain_down = unpack_experts(down, x.shape[1]).to(wide)
    y = torch.zeros_like(x, dtype=wide)
    for rank in range(index.shape[1]):
        own = index[:, rank].long()
        h = torch.bmm(plain_up[own], x.to(wide)[:, :, None])[:, :, 0]
        first = _activate(h[:, :inner], activation)
        h = first * h[:, inner:] if gated else first
        given = torch.bmm(plain_down[own], h[:, :, None])[:, :, 0]
        y += weights[:, rank, None].to(wide) * given
    return y.to(x.dtype)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _run(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    inference_only("moe_experts", x, weights)
    _check(activation)
    if x.dim() != 2:
        raise ValueError(f"moe_experts: x must have 2 dimensions, got shape {tuple(x.shape)}")
    x = contiguous_rows(x)
    y = x.new_empty(x.shape)
    native(x).moe_experts(
        x, index.contiguous(), dense_float32(weights), up, down, activation, gated, y
    )
    return y


_OP = Op(
    "moe_experts",
    "(Tensor x, Tensor index, Tensor weights, Tensor up, Tensor down, str activation, bool gated)"
    " -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def moe_experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
) -> torch.Tensor:
    """The weighted sum of what each row's own experts give (sparsely gated mixture of experts,
    arXiv 1701.06538): ``sum_r weights[t, r] * down_e(act(gate_e x_t) * up_e x_t)``, ``e = index[t, r]``.

    Rows are put in order of their expert, and each expert multiplies all of its rows at once, so
    that its weights are read once and nothing is padded (MegaBlocks, arXiv 2211.15841).

    Args:
        x: ``(rows, K)``, float32, bfloat16 or float16, whatever the weights' dtype.
        index: int32 ``(rows, top_k)``, in ``0 .. E - 1``; an expert may come twice.
        weights: ``(rows, top_k)``, taken as float32.
        up: from ``pack_experts`` of ``(E, 2 I, K)``, the gate's outputs first, or ``(E, I, K)``
            without a gate.
        down: from ``pack_experts`` of ``(E, K, I)``.
        activation: ``silu``, ``gelu`` (erf), ``gelu_tanh`` or ``relu2`` (the square of ReLU).
        gated: whether ``up`` holds gates too; else ``down_e(act(up_e x_t))``.

    Returns:
        ``(rows, K)`` in ``x``'s dtype; in between, everything is float32.

    A row's bits depend on that row and its experts alone; they are added in order of rank. Error
    bound: relative L2 against float64 <= 2e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype, device, index or activation that does not fit. On a
            GPU indices are not checked: a row gets nothing from an expert that does not exist.
        RuntimeError: an input requires grad.
    """
    return cast(torch.Tensor, _OP(x, index, weights, up, down, activation, gated))
