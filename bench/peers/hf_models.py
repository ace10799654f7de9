"""The two measured models, from configs with seeded random weights."""

from __future__ import annotations

import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

VOCAB = 50280


def mamba_130m() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=768, num_hidden_layers=24)
    return MambaForCausalLM(config).eval()


def mamba2_130m() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=768,
        num_hidden_layers=24,
        expand=2,
        head_dim=64,
        num_heads=24,
        state_size=128,
        n_groups=1,
        chunk_size=256,
        tie_word_embeddings=True,
    )
    return Mamba2ForCausalLM(config).eval()


BUILDERS = {"mamba-130m": mamba_130m, "mamba2-130m": mamba2_130m}


def prompt(tokens: int, rows: int = 1) -> torch.Tensor:
    """Seeded token ids; a longer prompt starts with the shorter one."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (tokens, rows), generator=generator).T.contiguous()
