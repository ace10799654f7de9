"""How sure a row of logits is: its two largest probabilities."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, inference_only, public


def _check(logits: torch.Tensor) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"softmax_top2: logits must have at least one column, got shape {tuple(logits.shape)}"
        )


def _reference(logits: torch.Tensor) -> torch.Tensor:
    _check(logits)
    if not logits.is_floating_point():
        raise TypeError(f"softmax_top2: logits must be floating point, got {logits.dtype}")
    wide = F.pad(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), (0, 1), value=-torch.inf
    )
    return wide.softmax(-1).topk(2, dim=-1).values


def _fake(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty((*logits.shape[:-1], 2), dtype=torch.float32)


def _run(logits: torch.Tensor) -> torch.Tensor:
    inference_only("softmax_top2", logits)
    _check(logits)
    y = _fake(logits)
    native(logits).softmax_top2(contiguous_rows(logits), y.view(-1, 2))
    return y


_OP = Op("softmax_top2", "(Tensor logits) -> Tensor", run=_run, fake=_fake, reference=_reference)


@public(_OP)
def softmax_top2(logits: torch.Tensor) -> torch.Tensor:
    """The two largest softmax probabilities of each row, the larger first.

    Their difference is the margin that early exits are judged by (arXiv 2207.07061).

    Args:
        logits: ``(..., V)``, float32, bfloat16 or float16, ``V`` at least 1; any strides (a copy is
            made unless the last dimension is dense and rows are evenly spaced).

    Returns:
        float32 ``(..., 2)``. The second is 0 for ``V`` of 1; both are NaN where the row holds NaN or
        +inf, or nothing but -inf. A row's bits depend on that row alone.

    Error bound: 1e-5 relative against float64 up to 2^18 columns, of a probability of at least 1e-30.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: the input requires grad.
    """
    return cast(torch.Tensor, _OP(logits))
