"""Time-invariant scan with constant, real or complex coefficients (S4D, arXiv 2206.11893)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, cast

import torch

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops._scan import take_token

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    reverse: bool,
    num_snapshots: int,
) -> _Results:
    batch, _, length = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    numbers = torch.promote_types(wide, _number_type(A_bar, B_bar, C))
    if cu_seqlens is not None:  # one sequence after the other
        y = torch.empty_like(u)
        last = u.new_empty(len(cu_seqlens) - 1, *A_bar.shape, dtype=numbers)
        snapshots = last[:, None].repeat(1, num_snapshots, 1, 1)
        for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            here = slice(begin, end)
            y[..., here], last[s : s + 1], snapshots[s : s + 1] = _reference(
                u[..., here], A_bar, B_bar, C, D,
                None if initial_state is None else initial_state[s : s + 1], None,
                None if mask is None else mask[..., here], reverse, num_snapshots,
            )  # fmt: skip
        return y, last, snapshots
    x, a, b, c = u.to(wide), A_bar.to(numbers), B_bar.to(numbers), C.to(numbers)
    h = u.new_zeros(batch, *A_bar.shape, dtype=numbers)
    if initial_state is not None:
        h = initial_state.to(numbers).clone()
    snapshots = h[:, None].repeat(1, num_snapshots, 1, 1)
    y = torch.zeros_like(u, dtype=wide)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        new = a * h + b * x[:, :, t, None]
        out = (c * new).sum(-1).real
        if D is not None:
            out = out + D.to(wide) * x[:, :, t]
        y[:, :, t], h, snapshots = take_token(
            out, new, h, snapshots, None if mask is None else mask[:, t]
        )
    return y.to(u.dtype), h, snapshots


def _number_type(*coefficients: torch.Tensor) -> torch.dtype:
    """Of coefficients and states: complex64 when any coefficient is complex."""
    return torch.complex64 if any(x.is_complex() for x in coefficients) else torch.float32


def _fake(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    C: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    num_snapshots: int,
) -> _Results:
    if A_bar.dim() != 2 or u.dim() != 3:
        raise ValueError(
            "selective_scan_lti: u and A_bar must have shapes (B, D, L) and (D, N), got "
            f"{tuple(u.shape)} and {tuple(A_bar.shape)}"
        )
    if cu_seqlens is not None and cu_seqlens.numel() == 0:
        raise ValueError("selective_scan_lti: cu_seqlens must have at least 1 element, got none")
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = _number_type(A_bar, B_bar, C)
    return (
        torch.empty_like(u),
        u.new_empty((sequences, *A_bar.shape), dtype=dtype),
        u.new_empty((sequences, num_snapshots, *A_bar.shape), dtype=dtype),
    )


def _run(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    reverse: bool,
    num_snapshots: int,
) -> _Results:
    inference_only("selective_scan_lti", u, A_bar, B_bar, C, initial_state)
    y, last, snapshots = _fake(u, A_bar, B_bar, C, cu_seqlens, num_snapshots)
    numbers = last.dtype
    if initial_state is not None:
        if initial_state.is_complex() and not numbers.is_complex:
            raise TypeError(
                "selective_scan_lti: initial_state must be real, as the coefficients, got "
                f"{initial_state.dtype}"
            )
        initial_state = _dense(initial_state, numbers)
    native(u).selective_scan_lti(
        u, _dense(A_bar, numbers), _dense(B_bar, numbers), _dense(C, numbers), dense_float32(D),
        initial_state, cu_seqlens, mask, reverse, y, last, snapshots,
    )  # fmt: skip
    return y, last, snapshots


def _dense(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).contiguous().resolve_conj()


_OP = Op(
    "selective_scan_lti",
    "(Tensor u, Tensor A_bar, Tensor B_bar, Tensor C, Tensor? D, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor? mask, bool reverse, int num_snapshots)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def selective_scan_lti(
    u: torch.Tensor,
    A_bar: torch.Tensor,
    B_bar: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    conjugate_pairs: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reverse: bool = False,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, ...]:
    """A diagonal recurrence with constant coefficients over a whole sequence: S4D, LRU.

    ``h_t = A_bar h_{t-1} + B_bar u_t``, ``y_t = Re(sum_n C[n] h_t[n]) + D u_t``, per channel.
    ``discretize`` makes ``A_bar`` and ``B_bar``; ``selective_scan_s5`` is the form with dense B, C.

    Args:
        u: ``(B, D, L)``, float32, bfloat16 or float16, any strides; views of time-major memory
            (channel stride 1) are fastest.
        A_bar, B_bar, C: ``(D, N)``, each real or complex.
        D: ``(D,)``.
        conjugate_pairs: each state stands for itself and its conjugate: the sum over n counts twice.
        initial_state: ``(B, D, N)``, or ``(S, D, N)`` with ``cu_seqlens``; zeros when None.
        cu_seqlens: ``(S + 1,)`` int32: the single batch row is S sequences one after the other.
        mask: ``(B, L)`` bool; False: the position neither touches the state nor gives output (0).
        reverse: walk each sequence from its end to its beginning.
        num_snapshots: K > 0 also returns the states after all but the last k tokens, k < K.

    Returns:
        ``(y, last_state)``: ``y`` in ``u``'s dtype and memory order, ``last_state`` (B or S, D, N)
        complex64, or float32 when all coefficients are real; with snapshots a third,
        ``(B or S, K, D, N)``, k = 0 the newest (that is ``last_state``), the initial state where a
        sequence has no more than k tokens.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, cu_seqlens that fall,
            ``conjugate_pairs`` with real coefficients, a complex state with real coefficients.
        RuntimeError: an input requires grad.
    """
    if num_snapshots < 0:
        raise ValueError(
            f"selective_scan_lti: num_snapshots must be 0 or more, got {num_snapshots}"
        )
    if conjugate_pairs:
        if not _number_type(A_bar, B_bar, C).is_complex:
            raise ValueError("selective_scan_lti: conjugate_pairs must come with complex numbers")
        C = 2 * C
    y, last, snapshots = cast(
        _Results,
        _OP(u, A_bar, B_bar, C, D, initial_state, cu_seqlens, mask, reverse, num_snapshots),
    )
    return (y, last, snapshots) if num_snapshots else (y, last)


def discretize(
    Lambda: torch.Tensor,
    B: torch.Tensor,
    step: torch.Tensor | float,
    method: Literal["zoh", "bilinear"] = "zoh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A_bar, B_bar)`` of the continuous diagonal system ``h' = Lambda h + B u``.

    With ``x = Lambda step``, zero-order hold: ``A_bar = exp(x)``, ``B_bar = (exp(x) - 1) / Lambda
    B``, whose limit at ``Lambda = 0`` is ``step B``; bilinear: ``A_bar = (1 + x/2) / (1 - x/2)``,
    ``B_bar = step / (1 - x/2) B``.

    Args:
        Lambda: ``(D, N)`` or ``(P,)``, real or complex.
        B: of ``Lambda``'s shape, or with one dimension more, as S5's ``(P, H)``.
        step: a number, or a tensor that broadcasts with ``Lambda``.

    Raises:
        ValueError: an unknown method.
    """
    x = Lambda * step
    if method == "zoh":
        small = x.abs() < 0.5
        series = torch.ones_like(x)  # (exp(x) - 1) / x = 1 + x/2 (1 + x/3 (1 + ...))
        for k in range(16, 1, -1):
            series = 1 + x * series / k
        nonzero = torch.where(small, torch.ones_like(x), x)
        A_bar, gain = torch.exp(x), step * torch.where(small, series, (nonzero.exp() - 1) / nonzero)
    elif method == "bilinear":
        A_bar, gain = (1 + x / 2) / (1 - x / 2), step / (1 - x / 2)
    else:
        raise ValueError(f"discretize: method must be 'zoh' or 'bilinear', got {method!r}")
    return A_bar, (gain[..., None] if B.dim() > gain.dim() else gain) * B
