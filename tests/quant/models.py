"""Tiny models to quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **SIZES,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    },
    "mamba": {**SIZES, "state_size": 16},
    "gpt2": {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def tiny_lm(family: str, seed: int = 0, **changes: Any) -> Any:
    """A language model with random weights, in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(count: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (2, count)."""
    return torch.randint(1, 97, (2, count), generator=torch.Generator().manual_seed(seed))


class Tower(nn.Module):
    """Linear layers with shared, nested and unusual places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 48)
        self.shared = nn.Linear(48, 48, bias=False)
        self.inner = nn.Sequential(nn.Linear(48, 48), nn.ReLU())
        self.inner.add_module("again", self.shared)
        self.last = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 64) to (..., 10)."""
        return self.last(self.inner(self.shared(self.first(x).relu())))
