"""One decode step of the Mamba-2 scan, in place in a pool of states."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, inference_only, public
from effinfer.ops._scan import in_float32


def _reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    repeat = x.shape[1] // B.shape[1]

    def by_channel(t: torch.Tensor, rank: int) -> torch.Tensor:
        return t.to(wide) if t.dim() == rank else t.to(wide)[..., None]

    delta = by_channel(dt, 3)
    if dt_bias is not None:
        delta = delta + by_channel(dt_bias, 2)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)
    rates = A.to(wide) if A.dim() == 3 else A.to(wide)[:, None, None]
    b, c = (m.to(wide).repeat_interleave(repeat, 1)[:, :, None] for m in (B, C))
    y = torch.zeros_like(x, dtype=wide)
    slots = range(x.shape[0]) if state_indices is None else state_indices.tolist()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        new = torch.exp(delta[row, ..., None] * rates) * state[slot].to(wide)
        new = new + (delta[row] * x[row].to(wide))[..., None] * b[row]
        state[slot] = new
        out = (new * c[row]).sum(-1)
        if D is not None:
            out = out + by_channel(D, 2) * x[row].to(wide)
        y[row] = out if z is None else out * F.silu(z[row].to(wide))
    return y.to(x.dtype)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _run(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("ssd_state_update", state, x, dt, B, C, z)
    y = x.new_empty(x.shape)
    native(x).ssd_state_update(
        state, x, dt, in_float32(A), B, C, in_float32(D), z, in_float32(dt_bias),
        dt_softplus, dt_min, dt_max, state_indices, y,
    )  # fmt: skip
    return y


_OP = Op(
    "ssd_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? state_indices)"
    " -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def ssd_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance each row's state by one token, in place, and return that token's output.

    ``d = clamp(softplus(dt + dt_bias), *dt_limit)``, ``S = exp(d A) S + d x B^T``,
    ``y = (S C + D x) * silu(z)``, the state ``S`` being ``(P, N)`` per head.

    Args:
        state: ``(slots, H, P, N)`` float32, written in place; any strides (N dense is fast).
        x: ``(batch, H, P)``, float32, bfloat16 or float16.
        dt: ``(batch, H)`` or ``(batch, H, P)``.
        A: ``(H,)`` or ``(H, P, N)``.
        B, C: ``(batch, G, N)`` of one dtype; G divides H.
        D, dt_bias: ``(H,)`` or ``(H, P)``.
        z: like ``x``, the gate.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: bounds of the step, applied last.
        state_indices: ``(batch,)`` int32, the slot of each row; -1 touches no state and gives 0;
            a slot may not occur twice. None: row b uses slot b.

    Returns:
        ``y`` like ``x``. A row's bits depend neither on the other rows nor on the threads.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype, device or slot that does not fit; no state is changed.
        RuntimeError: an input requires grad.
    """
    out = _OP(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), state_indices,
    )  # fmt: skip
    return cast(torch.Tensor, out)
