"""A mixer's causal convolution, with the right state after a padded prompt."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from effinfer import ops


def conv_parameters(conv: nn.Conv1d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (D, W) and bias of a depthwise convolution, in float32 as the op uses them."""
    bias = None if conv.bias is None else conv.bias.float()
    return conv.weight.squeeze(1).float(), bias


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    state: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve (B, D, L) from ``state``: output, and the state after the last real token."""
    y, final = ops.causal_conv1d(x, weight, bias, activation, initial_state=state, mask=mask)[:2]
    if mask is not None:
        final = last_real_columns(x, mask, state, final.shape[2])
    return y, final


def last_real_columns(
    x: torch.Tensor, mask: torch.Tensor, initial: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """The last ``columns`` inputs (B, D, columns) that ``mask`` (B, L) leaves in, oldest first.

    Where a row has fewer, what was in its ``initial`` state moves up, as if the row were shorter.
    The op's own final state counts a masked token as an input of zero: right for what comes before
    a prompt, wrong for what comes after it.
    """
    times = torch.arange(mask.shape[1], device=mask.device)
    times = F.pad(torch.where(mask, times, -1), (columns, 0), value=-1)
    newest = times.topk(columns, dim=1).values.flip(1)
    real = x.gather(2, newest.clamp(min=0)[:, None].expand(-1, x.shape[1], -1)).float()
    missing = newest < 0
    if initial is None:
        return real.masked_fill(missing[:, None], 0)
    shifted = torch.arange(columns, device=mask.device) + columns - missing.sum(1, keepdim=True)
    kept = initial.gather(2, shifted.clamp(max=columns - 1)[:, None].expand(-1, x.shape[1], -1))
    return torch.where(missing[:, None], kept.float(), real)
