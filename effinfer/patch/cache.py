"""Reading and writing the SSM states in Hugging Face's cache, over transformers' versions of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from effinfer.errors import UnsupportedOpError

States = tuple[torch.Tensor, torch.Tensor]


def read_states(cache: Any, layer_idx: int) -> States | None:
    """The layer's convolution (B, D, K) and recurrent state; None before its first token."""
    layer = cache.layers[layer_idx]
    conv, ssm, seen = layer.conv_states, layer.recurrent_states, layer.has_previous_state
    if isinstance(seen, dict):  # transformers >= 5.16: a layer may hold several states
        conv, ssm, seen = conv[0], ssm[0], seen[0]
    if getattr(layer, "record_past", False):
        raise UnsupportedOpError(
            "this cache records past states (activate_past_recording), which a patched mixer "
            "does not do; run this generation on the unpatched model"
        )
    return (conv, ssm) if seen else None


def write_states(cache: Any, layer_idx: int, conv_state: torch.Tensor, ssm: torch.Tensor) -> None:
    """Store both states after a run of tokens."""
    # Hugging Face keeps as many columns as the kernel is wide, of which the oldest is never used.
    cache.update_conv_state(F.pad(conv_state, (1, 0)), layer_idx)
    cache.update_recurrent_state(ssm, layer_idx)
