"""The Mamba-2 scan, state space duality (arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, inference_only, public
from effinfer.ops._scan import in_float32

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _sequences(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> Iterator[tuple[int, int, slice]]:
    """Number, batch row and positions of each sequence."""
    if cu_seqlens is None:
        yield from ((row, row, slice(0, x.shape[1])) for row in range(x.shape[0]))
    else:
        ends = cu_seqlens.tolist()
        yield from ((s, 0, slice(*ends[s : s + 2])) for s in range(len(ends) - 1))


def _reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    num_snapshots: int,
    one_by_one: bool = False,
) -> Tensors:
    wide = torch.promote_types(x.dtype, torch.float32)
    repeat = x.shape[2] // B.shape[2]
    xs, Bs, Cs = x.to(wide), B.to(wide), C.to(wide)
    delta = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)
    decay = torch.exp(delta * A.to(wide))
    skip = None if D is None else (D if D.dim() == 2 else D[:, None]).to(wide)
    y = torch.zeros_like(xs)
    last, snapshots = (s.to(wide) for s in _empty_states(x, B, cu_seqlens, num_snapshots))
    for s, row, positions in _sequences(x, cu_seqlens):
        state = torch.zeros_like(last[s]) if initial_state is None else initial_state[s].to(wide)
        recent = deque([state] * num_snapshots, maxlen=num_snapshots)
        current: int | None = None
        for t in range(positions.start, positions.stop):
            if mask is not None and not mask[row, t]:
                continue
            if seq_idx is not None:
                here = int(seq_idx[row, t])
                if current not in (None, here):
                    state = torch.zeros_like(state)
                    recent.extend([state] * num_snapshots)
                current = here
            b, c = (m[row, t].repeat_interleave(repeat, 0)[:, None] for m in (Bs, Cs))
            step = (delta[row, t, :, None] * xs[row, t])[..., None] * b
            state = decay[row, t, :, None, None] * state + step
            recent.append(state)
            out = (state * c).sum(-1)
            if skip is not None:
                out = out + skip * xs[row, t]
            y[row, t] = out if z is None else out * F.silu(z[row, t].to(wide))
        last[s] = state
        for k, kept in enumerate(reversed(recent)):
            snapshots[s, k] = kept
    return y.to(x.dtype), last, snapshots


def _empty_states(
    x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None, num_snapshots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (x.shape[2], x.shape[3], B.shape[3])
    return (
        x.new_empty((sequences, *state), dtype=torch.float32),
        x.new_empty((sequences, num_snapshots, *state), dtype=torch.float32),
    )


def _fake(
    x: torch.Tensor, B: torch.Tensor, cu_seqlens: torch.Tensor | None, num_snapshots: int
) -> Tensors:
    if x.dim() != 4 or B.dim() != 4:
        name, got = ("x", x) if x.dim() != 4 else ("B", B)
        raise ValueError(f"ssd: {name} must have 4 dimensions, got shape {tuple(got.shape)}")
    return x.new_empty(x.shape), *_empty_states(x, B, cu_seqlens, num_snapshots)


def _run(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    num_snapshots: int,
    one_by_one: bool = False,
) -> Tensors:
    inference_only("ssd", x, dt, B, C, z, initial_state)
    y, last, snapshots = _fake(x, B, cu_seqlens, num_snapshots)
    if initial_state is not None and not initial_state.is_contiguous():
        initial_state = initial_state.contiguous()
    native(x).ssd(
        x, dt, in_float32(A), B, C, in_float32(D), z, in_float32(dt_bias), initial_state, seq_idx,
        cu_seqlens, mask, dt_softplus, dt_min, dt_max, one_by_one, y, last,
        snapshots if num_snapshots else None,
    )  # fmt: skip
    return y, last, snapshots


_OP = Op(
    "ssd",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? mask, bool dt_softplus,"
    " float dt_min, float dt_max, int num_snapshots, bool one_by_one=False) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    mask: torch.Tensor | None = None,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, torch.Tensor] | Tensors:
    """Scan a sequence with one matrix state and one scalar decay per head.

    ``d = clamp(softplus(dt + dt_bias), *dt_limit)``, ``S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T``,
    ``y_t = (S_t C_t + D x_t) * silu(z_t)``, the state ``S`` being ``(P, N)`` per head.

    Args:
        x: ``(batch, length, H, P)``, float32, bfloat16 or float16, any strides.
        dt: ``(batch, length, H)``.
        A: ``(H,)``, negative in trained models.
        B, C: ``(batch, length, G, N)`` of one dtype; G divides H.
        chunk_size: 1 takes the tokens one by one, with the bits of ``ssd_state_update``
            wherever a run begins and ends; any other is taken for compatibility: the kernels choose
            their own.
        D: ``(H,)`` or ``(H, P)``.
        z: like ``x``, the gate.
        dt_bias: ``(H,)``.
        initial_state: ``(sequences, H, P, N)`` float32; zeros if None.
        seq_idx: ``(batch, length)`` int32; where it changes inside a row the state restarts at zero.
        cu_seqlens: ``(S + 1,)`` int32: the one batch row holds S sequences end to end, each with
            its own initial and last state; a sequence may be empty.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        dt_limit: bounds of the step, applied last.
        mask: ``(batch, length)`` bool; where it is False there is no token: ``y`` is 0, the state
            passes, and the values there don't matter.
        num_snapshots: also return the states after each of the last K tokens.

    Returns:
        ``(y, last_state)``, with snapshots ``(y, last_state, snapshots)``: ``y`` like ``x``,
        ``last_state`` ``(sequences, H, P, N)`` float32 (a row's last id with ``seq_idx``),
        ``snapshots`` ``(sequences, K, H, P, N)``, newest first, the initial state where the
        sequence is shorter. Snapshot k is bit for bit the last state of a run without the last k
        tokens. Results depend neither on the other sequences nor on the threads.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, or bad ``cu_seqlens``.
        RuntimeError: an input requires grad.
    """
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be 1 or more, got {chunk_size}")
    if num_snapshots < 0:
        raise ValueError(f"ssd: num_snapshots must be 0 or more, got {num_snapshots}")
    out = _OP(
        x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, mask,
        dt_softplus, float(dt_limit[0]), float(dt_limit[1]), num_snapshots, chunk_size == 1,
    )  # fmt: skip
    return cast(Tensors, out) if num_snapshots else cast(Tensors, out)[:2]
