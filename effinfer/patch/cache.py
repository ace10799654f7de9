"""Reading and writing the SSM states in Hugging Face's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from effinfer.errors import UnsupportedOpError

States = tuple[torch.Tensor, torch.Tensor]


def read_states(cache: Any, layer_idx: int) -> States | None:
    """The layer's convolution (B, D, K) and recurrent state; None before its first token."""
    layer = cache.layers[layer_idx]
    if layer.record_past:
        raise UnsupportedOpError(
            "this cache records past states (activate_past_recording), which a patched mixer "
            "does not do; run this generation on the unpatched model"
        )
    return (
        (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None
    )


def write_states(cache: Any, layer_idx: int, conv_state: torch.Tensor, ssm: torch.Tensor) -> None:
    """Store both states after a run of tokens."""
    # Hugging Face keeps as many columns as the kernel is wide, of which the oldest is never used.
    cache.update_conv_state(F.pad(conv_state, (1, 0)), layer_idx)
    cache.update_recurrent_state(ssm, layer_idx)
