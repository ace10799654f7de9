"""The gate of a gated MLP (SwiGLU, arXiv 2002.05202), where it cannot be a product's epilogue."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, inference_only, public


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(
            f"silu_mul: up must have shape {tuple(gate.shape)} like gate, got {tuple(up.shape)}"
        )


def _reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _fake(gate: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    inference_only("silu_mul", gate, up)
    _check(gate, up)
    y = _fake(gate)
    native(gate).silu_mul(contiguous_rows(gate), contiguous_rows(up), y)
    return y


_OP = Op(
    "silu_mul", "(Tensor gate, Tensor up) -> Tensor", run=_run, fake=_fake, reference=_reference
)


@public(_OP)
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, element by element, in float32.

    Args:
        gate: ``(..., D)``, float32, bfloat16 or float16; any strides (a copy is made unless the last
            dimension is dense and rows are evenly spaced).
        up: like ``gate``.

    Returns:
        A dense tensor of ``gate``'s shape and dtype. An element's bits depend on its two inputs
        alone.

    Error bound: relative L2 against float64 <= 1e-6 (float32), 4e-3 (bfloat16), 5e-4 (float16).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    return cast(torch.Tensor, _OP(gate, up))
