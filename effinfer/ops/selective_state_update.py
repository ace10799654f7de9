"""One decode step of Mamba-1's selective scan (arXiv 2312.00752), in place."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops.ssd_state_update import ssd_state_update


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
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, dim = x.shape
    slots = torch.arange(batch, device=x.device) if state_indices is None else state_indices.long()
    valid = slots >= 0
    step, u = dt.to(wide), x.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    B, C = (
        (m[:, None] if m.dim() == 2 else m).to(wide).repeat_interleave(
            dim if m.dim() == 2 else dim // m.shape[1], 1
        )
        for m in (B, C)
    )  # fmt: skip
    decay = torch.exp(step[..., None] * A.to(wide))
    h = decay * state[slots.clamp_min(0)].to(wide) + (step * u)[..., None] * B
    state[slots[valid]] = h[valid].to(state.dtype)
    y = (C * h).sum(-1)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return torch.where(valid[:, None], y, torch.zeros_like(y)).to(x.dtype)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


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
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("selective_state_update", state, x, dt, A, B, C, z)
    y = torch.empty_like(x)
    native(x).selective_state_update(
        state, x, dt, dense_float32(A), B, C, dense_float32(D), z, dense_float32(dt_bias),
        dt_softplus, state_indices, y,
    )  # fmt: skip
    return y


_OP = Op(
    "selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, Tensor? state_indices) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def selective_state_update(
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
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance Mamba states by one token, in place.

    ``d = softplus(dt + dt_bias)``, ``h = exp(d A) h + d x B``, ``y = (sum_n C[n] h[n] + D x) *
    silu(z)``.

    Args:
        state: ``(S, D, N)`` float32, any strides, updated. A 4-D state ``(S, H, P, N)`` is Mamba-2's:
            the call is then `ssd_state_update` with the same arguments.
        x, dt, z: ``(B, D)``, float32, bfloat16 or float16, any strides.
        A: ``(D, N)``, real.
        B, C: ``(B, N)``, or ``(B, G, N)`` with each of the G groups serving D/G channels.
        D, dt_bias: ``(D,)``.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        state_indices: ``(B,)`` int32, the slot of each row; -1: the row is skipped and its y is 0.
            None: row b has slot b, and S = B.

    Returns:
        ``y`` of shape ``(B, D)`` in ``x``'s dtype.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, a slot out of range or
            named twice; the states are then unchanged.
        RuntimeError: an input requires grad.
    """
    if isinstance(state, torch.Tensor) and state.dim() == 4:
        return ssd_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices=state_indices
        )
    return cast(
        torch.Tensor,
        _OP(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices),
    )
