"""Scan of a Legendre memory unit (Voelker, Kajic, Eliasmith, NeurIPS 2019)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_PANEL = 16  # kLmuPanel of csrc/ops/selective_scan_lmu/selective_scan_lmu.h
_CHUNK = 64  # a power of two


def _reference(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    initial_state: torch.Tensor | None,
    last_only: bool,
    num_snapshots: int,
) -> _Results:
    batch, dim, length = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    x, a, b = u.to(wide), A_bar.to(wide), B_bar.to(wide)
    m = u.new_zeros((batch, dim, b.shape[0]), dtype=wide)
    if initial_state is not None:
        m = initial_state.to(wide)
    states = [m] * num_snapshots
    memories = u.new_empty((batch, dim, 0 if last_only else length, b.shape[0]))
    for t in range(length):
        m = m @ a.t() + x[:, :, t, None] * b
        states = [m, *states][:num_snapshots]
        if not last_only:
            memories[:, :, t] = m
    snapshots = m.new_empty((batch, num_snapshots, dim, b.shape[0]))
    for k, saved in enumerate(states):
        snapshots[:, k] = saved
    return memories, m.clone(), snapshots


def _fake(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    last_only: bool,
    num_snapshots: int,
) -> _Results:
    state = B_bar.shape[0] if B_bar.dim() == 1 else -1
    if u.dim() != 3 or A_bar.shape != (state, state):
        raise ValueError(
            "selective_scan_lmu: u, A_bar and B_bar must have shapes (B, D, L), (N, N) and (N,), "
            f"got {', '.join(str(tuple(x.shape)) for x in (u, A_bar, B_bar))}"
        )
    batch, dim, length = u.shape
    return (
        u.new_empty((batch, dim, 0 if last_only else length, state)),
        u.new_empty((batch, dim, state), dtype=torch.float32),
        u.new_empty((batch, num_snapshots, dim, state), dtype=torch.float32),
    )


def _transition(A_bar: torch.Tensor, B_bar: torch.Tensor, chunk: int) -> torch.Tensor:
    """What takes (m, chunk inputs) to the memory after them, in the kernel's panels of columns."""
    power, columns = A_bar.double(), B_bar.double()[:, None]  # A^j; B, A B .. A^{j-1} B
    while columns.shape[1] < chunk:
        columns = torch.cat([columns, power @ columns], 1)
        power = power @ power
    whole = torch.cat([power, columns.flip(1)], 1).t().float()
    whole = F.pad(whole, (0, -whole.shape[1] % _PANEL))
    panels = whole.reshape(whole.shape[0], whole.shape[1] // _PANEL, _PANEL)
    return panels.movedim(1, 0).contiguous()


def _run(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    initial_state: torch.Tensor | None,
    last_only: bool,
    num_snapshots: int,
) -> _Results:
    inference_only("selective_scan_lmu", u, A_bar, B_bar, initial_state)
    memories, last, snapshots = _fake(u, A_bar, B_bar, last_only, num_snapshots)
    start = dense_float32(initial_state)
    scan = native(u).selective_scan_lmu
    # The powers cost some matrix products; from here on they are worth it for a few channels. The
    # choice looks at one row's shape only, so that the batch changes no bits.
    head = (u.shape[2] - num_snapshots) // _CHUNK * _CHUNK
    if last_only and head >= 2 * B_bar.shape[0]:
        middle = torch.empty_like(last)
        scan(u[..., :head], _transition(A_bar, B_bar, _CHUNK), start, memories, middle,
             snapshots[:, :0])  # fmt: skip
        u, start = u[..., head:], middle
    scan(u, _transition(A_bar, B_bar, 1), start, memories, last, snapshots)
    return memories, last, snapshots


_OP = Op(
    "selective_scan_lmu",
    "(Tensor u, Tensor A_bar, Tensor B_bar, Tensor? initial_state, bool last_only,"
    " int num_snapshots) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def selective_scan_lmu(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    last_only: bool = False,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Legendre memories of a sequence: ``m_t = A_bar m_{t-1} + B_bar u_t``, each channel its own.

    ``lmu_matrices`` makes ``A_bar`` and ``B_bar``; any dense pair will do. The memory looks back
    only, so there is no reverse direction.

    Args:
        u: ``(B, D, L)``, float32, bfloat16 or float16, any strides.
        A_bar, B_bar: ``(N, N)`` and ``(N,)``, float32 or float64, the same for all channels.
        initial_state: ``(B, D, N)``; zeros when None.
        last_only: keep no memory but the last. Long sequences then take many positions in a step, N
            times faster, and rounded a little differently.
        num_snapshots: K > 0 also returns the memories after all but the last k positions, k < K.

    Returns:
        ``(m, last_state)``: ``m`` (B, D, L, N) in ``u``'s dtype, (B, D, 0, N) with ``last_only``;
        ``last_state`` (B, D, N) float32; with snapshots a third, (B, K, D, N) float32, k = 0 the
        newest, the initial state where there are no more than k positions.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    if num_snapshots < 0:
        raise ValueError(
            f"selective_scan_lmu: num_snapshots must be 0 or more, got {num_snapshots}"
        )
    m, last, snapshots = cast(
        _Results, _OP(u, A_bar, B_bar, initial_state, last_only, num_snapshots)
    )
    return (m, last, snapshots) if num_snapshots else (m, last)


def lmu_matrices(N: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A_bar, B_bar)`` of N Legendre polynomials over the last ``theta`` positions, float64.

    ``A[i, j] = (2i + 1) / theta (-1 if i < j else (-1)^(i-j+1))``, ``B[i] = (2i + 1) (-1)^i /
    theta``, discretised by zero-order hold for steps of one position.
    """
    if N < 1 or not theta > 0:
        raise ValueError(f"lmu_matrices: N and theta must be positive, got {N} and {theta}")
    i = torch.arange(N, dtype=torch.float64)
    scale, sign = (2 * i + 1) / theta, 1 - 2 * (i % 2)
    A = torch.where(i[:, None] < i, -torch.ones_like(scale), -sign[:, None] * sign)
    # The exponential of [[A, B], [0, 0]] is [[A_bar, B_bar], [0, 1]].
    block = torch.zeros(N + 1, N + 1, dtype=torch.float64)
    block[:N, :N], block[:N, N] = scale[:, None] * A, scale * sign
    block = torch.linalg.matrix_exp(block)
    return block[:N, :N].contiguous(), block[:N, N].contiguous()
