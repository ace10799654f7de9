"""Causal depthwise convolution over a sequence, with the tail carried in and out."""

from __future__ import annotations

from itertools import pairwise

import torch

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public


def wants_silu(op: str, activation: str | None) -> bool:
    """Whether ``activation`` asks for silu; ValueError for an unknown name."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def convolve(
    columns: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    dilation: int,
) -> torch.Tensor:
    """The convolution of (B,D,past+L) columns, the first ``past`` of which only give context."""
    length = columns.shape[2] - (weight.shape[1] - 1) * dilation
    y = columns.new_zeros(*columns.shape[:2], length)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    for tap in range(weight.shape[1]):
        y = y + weight[:, tap, None].to(y.dtype) * columns.narrow(2, tap * dilation, length)
    return torch.nn.functional.silu(y) if silu else y


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    initial_state: torch.Tensor | None = None,
    dilation: int = 1,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    past = (weight.shape[1] - 1) * dilation
    y, states = _fake(x, weight, dilation, cu_seqlens, num_snapshots)
    states = states.to(wide)
    tokens = x.to(wide) if mask is None else x.to(wide).masked_fill(~mask[:, None], 0)
    if cu_seqlens is None:
        parts = [(slice(i, i + 1), slice(None)) for i in range(x.shape[0])]
    else:
        edges = cu_seqlens.tolist()
        parts = [(slice(0, 1), slice(*edge)) for edge in pairwise(edges)]
    for i, (row, times) in enumerate(parts):
        tail = tokens[row, :, times]
        before = tail.new_zeros(1, x.shape[1], past)
        if initial_state is not None:
            before = initial_state[i : i + 1].to(wide)
        columns = torch.cat([before, tail], dim=2)
        y[row, :, times] = convolve(columns, weight, bias, silu, dilation).to(y.dtype)
        ends = [max(tail.shape[2] - k, 0) for k in range(max(num_snapshots, 1))]
        last = torch.stack([columns[0].narrow(1, end, past) for end in ends])
        states[i] = last if num_snapshots else last[0]
    return y if mask is None else y.masked_fill(~mask[:, None], 0), states


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    dilation: int,
    cu_seqlens: torch.Tensor | None,
    num_snapshots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (x.shape[1], (weight.shape[1] - 1) * dilation)
    shape = (sequences, num_snapshots, *state) if num_snapshots else (sequences, *state)
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.float32)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    dilation: int,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    num_snapshots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    inference_only("causal_conv1d", x, initial_state)
    weight, bias = dense_float32(weight), dense_float32(bias)
    initial_state = dense_float32(initial_state)
    _check(x, weight, dilation, num_snapshots)
    y, states = _fake(x, weight, dilation, cu_seqlens, num_snapshots)
    native(x).causal_conv1d(
        x,
        weight,
        bias,
        silu,
        initial_state,
        dilation,
        cu_seqlens,
        mask,
        max(num_snapshots, 1),
        y,
        states,
    )
    return y, states


def _check(x: torch.Tensor, weight: torch.Tensor, dilation: int, num_snapshots: int) -> None:
    """What the outputs' shapes rest on; the binding checks the rest."""
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d: x must have shape (B, D, L), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"causal_conv1d: weight must have shape (D, W), got {tuple(weight.shape)}")
    if dilation < 1:
        raise ValueError(f"causal_conv1d: dilation must be 1 or more, got {dilation}")
    if num_snapshots < 0:
        raise ValueError(f"causal_conv1d: num_snapshots must be 0 or more, got {num_snapshots}")


_OP = Op(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, int dilation,"
    " Tensor? cu_seqlens, Tensor? mask, int num_snapshots) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    dilation: int = 1,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Convolve each channel with its own causal filter, carrying the tail in and out.

    ``y[d,t] = act(bias[d] + sum_j weight[d,j] * x[d, t - (W-1-j)*dilation])``. With
    ``past = (W-1)*dilation``, a state is the last ``past`` inputs, newest last.

    Args:
        x: ``(B, D, L)``, float32, bfloat16 or float16, any strides; fast when channels (a view of
            time-major memory) or times are dense. ``y`` keeps its memory order.
        weight: ``(D, W)``; any W >= 1, fastest for 2 to 8.
        bias: ``(D,)`` or None.
        activation: None, ``"silu"`` or ``"swish"``.
        initial_state: the inputs before the first, ``(B, D, past)``, or ``(S, D, past)`` with
            ``cu_seqlens``; None for zeros.
        dilation: distance between taps.
        cu_seqlens: int32 ``(S+1,)``, the edges of S sequences packed into a batch of 1.
        mask: ``(B, L)`` bool. A False position counts as ``x = 0``, in the convolution and in the
            states, whatever it holds, and its ``y`` is 0.
        num_snapshots: K > 0 also returns the states after each of the last K tokens.

    Returns:
        ``(y, final_state)`` or ``(y, final_state, snapshots)``: ``y`` like ``x``, the state
        ``(B|S, D, past)`` in float32 (the initial one for L = 0), and snapshots ``(B|S, K, D,
        past)``, newest first, the initial state where the sequence is shorter.

    Splitting a sequence anywhere gives the same bits as one call. Error bound: relative L2 against
    float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    silu = wants_silu("causal_conv1d", activation)
    y, states = _OP(x, weight, bias, silu, initial_state, dilation, cu_seqlens, mask, num_snapshots)
    return (y, states[:, 0].clone(), states) if num_snapshots else (y, states)
