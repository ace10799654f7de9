"""One decode step (or a few) of ``causal_conv1d``, on states in place."""

from __future__ import annotations

from typing import cast

import torch

from effinfer._native import native
from effinfer.ops._register import Op, dense_float32, inference_only, public
from effinfer.ops.causal_conv1d import convolve, wants_silu


def _reference(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    dilation: int = 1,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    past = (weight.shape[1] - 1) * dilation
    y = torch.zeros_like(x)
    slots = range(x.shape[0]) if state_indices is None else state_indices.tolist()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        state = conv_state[slot]
        columns = torch.cat([state.to(wide), x[row].reshape(x.shape[1], -1).to(wide)], dim=1)
        context = columns[None, :, state.shape[1] - past :]
        y[row] = convolve(context, weight, bias, silu, dilation).reshape(x[row].shape).to(x.dtype)
        state.copy_(columns[:, columns.shape[1] - state.shape[1] :])
    return y


def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _run(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    dilation: int,
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    inference_only("causal_conv1d_update", x, conv_state)
    y = torch.empty_like(x)
    native(x).causal_conv1d_update(
        x, conv_state, dense_float32(weight), dense_float32(bias), silu, dilation, state_indices, y
    )
    return y


_OP = Op(
    "causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, int dilation,"
    " Tensor? state_indices) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    dilation: int = 1,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Continue ``causal_conv1d`` by the tokens of ``x``, updating each row's state in place.

    Args:
        x: ``(B, D)`` or ``(B, D, l)``, float32, bfloat16 or float16, any strides.
        conv_state: ``(S, D, K)``, any float dtype and strides, the last inputs with the newest in
            the last column; ``K >= (W-1)*dilation``. It moves left by one column per token.
        weight, bias, activation, dilation: as for ``causal_conv1d``.
        state_indices: int32 ``(B,)``, the slot of ``conv_state`` that each row continues; -1 skips
            the row (its ``y`` is 0). Without it, ``S = B`` and row b uses slot b.

    Returns:
        ``y`` like ``x``; the bits are those of ``causal_conv1d`` over the whole sequence when the
        state's dtype holds the inputs exactly. Same error bound.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; an index out of range; a
            slot named twice. The states are unchanged then.
        RuntimeError: an input requires grad.
    """
    silu = wants_silu("causal_conv1d_update", activation)
    return cast(torch.Tensor, _OP(x, conv_state, weight, bias, silu, dilation, state_indices))
