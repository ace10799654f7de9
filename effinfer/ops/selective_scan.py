"""Selective scan of Mamba-1 (arXiv 2312.00752), with states in and out."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops._scan import per_channel, take_token

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    reverse: bool,
    num_snapshots: int,
) -> _Results:
    batch, dim, length = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    if cu_seqlens is not None:  # one sequence after the other
        y = torch.empty_like(u)
        last = u.new_empty(len(cu_seqlens) - 1, *A.shape, dtype=wide)
        snapshots = last[:, None].repeat(1, num_snapshots, 1, 1)
        for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            here = slice(begin, end)
            y[..., here], last[s : s + 1], snapshots[s : s + 1] = _reference(
                u[..., here], delta[..., here], A, B if B.dim() == 2 else B[..., here],
                C if C.dim() == 2 else C[..., here], D, None if z is None else z[..., here],
                delta_bias, delta_softplus,
                None if initial_state is None else initial_state[s : s + 1], None,
                None if mask is None else mask[..., here], reverse, num_snapshots,
            )  # fmt: skip
        return y, last, snapshots
    B, C = (per_channel(m.to(wide), batch, dim, length) for m in (B, C))
    step, x, a = delta.to(wide), u.to(wide), A.to(wide)
    if delta_bias is not None:
        step = step + delta_bias.to(wide)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    h = u.new_zeros(batch, dim, A.shape[1], dtype=wide)
    if initial_state is not None:
        h = initial_state.to(wide).clone()
    snapshots = h[:, None].repeat(1, num_snapshots, 1, 1)
    y = torch.zeros_like(u, dtype=wide)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        d = step[:, :, t, None]
        new = torch.exp(d * a) * h + d * x[:, :, t, None] * B[..., t]
        out = (C[..., t] * new).sum(-1)
        if D is not None:
            out = out + D.to(wide) * x[:, :, t]
        if z is not None:
            out = out * F.silu(z[:, :, t].to(wide))
        y[:, :, t], h, snapshots = take_token(
            out, new, h, snapshots, None if mask is None else mask[:, t]
        )
    return y.to(u.dtype), h, snapshots


def _fake(
    u: torch.Tensor, A: torch.Tensor, cu_seqlens: torch.Tensor | None, num_snapshots: int
) -> _Results:
    if A.dim() != 2:
        raise ValueError(f"selective_scan: A must have shape (D, N), got {tuple(A.shape)}")
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels, state = A.shape
    return (
        torch.empty_like(u),
        u.new_empty((sequences, channels, state), dtype=torch.float32),
        u.new_empty((sequences, num_snapshots, channels, state), dtype=torch.float32),
    )


def _run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    reverse: bool,
    num_snapshots: int,
) -> _Results:
    inference_only("selective_scan", u, delta, A, B, C, z, initial_state)
    y, last, snapshots = _fake(u, A, cu_seqlens, num_snapshots)
    native(u).selective_scan(
        u, delta, dense_float32(A), B, C, dense_float32(D), z, dense_float32(delta_bias),
        delta_softplus, dense_float32(initial_state), cu_seqlens, mask, reverse, y, last, snapshots,
    )  # fmt: skip
    return y, last, snapshots


_OP = Op(
    "selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens,"
    " Tensor? mask, bool reverse, int num_snapshots) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reverse: bool = False,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Mamba-1's recurrence over a whole prompt.

    ``d = softplus(delta + delta_bias)``, ``h_t = exp(d_t A) h_{t-1} + d_t u_t B_t``,
    ``y_t = (sum_n C_t[n] h_t[n] + D u_t) * silu(z_t)``.

    Args:
        u: ``(B, D, L)``, float32, bfloat16 or float16, any strides; views of time-major memory
            (channel stride 1) are fastest.
        delta, z: as ``u`` (each may have its own float type); ``z`` gates the output.
        A: ``(D, N)``, real, of any sign.
        B, C: ``(D, N)`` constant, ``(B, N, L)`` per position, or ``(B, G, N, L)`` with each of the
            G groups serving D/G channels.
        D, delta_bias: ``(D,)``.
        delta_softplus: apply softplus to ``delta + delta_bias``.
        initial_state: ``(B, D, N)``, or ``(S, D, N)`` with ``cu_seqlens``; zeros when None.
        cu_seqlens: ``(S + 1,)`` int32: the single batch row is S sequences one after the other.
        mask: ``(B, L)`` bool; False: the position neither touches the state nor gives output (0).
        reverse: walk each sequence from its end to its beginning.
        num_snapshots: K > 0 also returns the states after all but the last k tokens, k < K.

    Returns:
        ``(y, last_state)``: ``y`` in ``u``'s dtype and memory order, ``last_state`` (B or S, D, N)
        float32; with snapshots a third, ``(B or S, K, D, N)`` float32, k = 0 the newest (that is
        ``last_state``), the initial state where a sequence has no more than k tokens.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, cu_seqlens that fall.
        RuntimeError: an input requires grad.
    """
    if num_snapshots < 0:
        raise ValueError(f"selective_scan: num_snapshots must be 0 or more, got {num_snapshots}")
    y, last, snapshots = cast(
        _Results,
        _OP(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, mask,
            reverse, num_snapshots,
        ),
    )  # fmt: skip
    return (y, last, snapshots) if num_snapshots else (y, last)
