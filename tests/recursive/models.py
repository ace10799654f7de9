"""Tiny recursive models, with weights random enough for every part to matter."""

from __future__ import annotations

from typing import Any

import torch

from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM

VOCABULARY = 61


def tiny_config(**changes: Any) -> RecursiveConfig:
    """Two layers in three loops, grouped queries, rank 3, biases and head norms."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_layers": 2,
        "loops": 3,
        "lora_rank": 3,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
    }
    return RecursiveConfig(**fields | changes)


def tiny_model(seed: int = 0, **changes: Any) -> RecursiveForCausalLM:
    """A float32 model in eval mode whose every parameter is random."""
    torch.manual_seed(seed)
    model = RecursiveForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def random_tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """(rows, length) token ids."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
