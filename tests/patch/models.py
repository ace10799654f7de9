"""Tiny models of every patched family, with weights random enough for every path to matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 3, "state_size": 16},
    "falcon_mamba": {"num_hidden_layers": 3, "state_size": 16},
    "mamba2": {
        "num_hidden_layers": 3,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 32,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "use_mamba_kernels": False,
        **_ATTENTION,
    },
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], **_ATTENTION, **_MAMBA2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "mamba_d_state": 16,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "chunk_size": 32,
        "adapter_rank": 8,
        **_ATTENTION,
        "num_key_value_heads": 4,
    },
    "falcon_h1": {
        "num_hidden_layers": 3,
        "mamba_d_ssm": 128,
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "ssm_in_multiplier": 1.3,
        "mlp_multipliers": [1.1, 0.9],
        **_ATTENTION,
        **_MAMBA2,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "head_dim": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48,
        "use_mamba_kernels": False,
        **_ATTENTION,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 96,
        "num_local_experts": 4,
        **_ATTENTION,
        **_MAMBA2,
    },
}
# The same family in a shape that takes another path through the mixer.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1_gated_norm": ("falcon_h1", {"mamba_rms_norm": True}),
    "falcon_h1_gate_first": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
}
FAMILIES = tuple(CONFIGS)
PURE_SSM = ("mamba", "falcon_mamba", "mamba2")


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a family, or of one of its variants."""
    family, variant = VARIANTS.get(name, (name, {}))
    return AutoConfig.for_model(family, **(SIZES | CONFIGS[family] | variant | changes))


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A stock model in eval mode, the same weights for the same seed."""
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if parameter_name.endswith("A_log"):
                p.add_(0.1 * noise)
            elif p.dim() >= 2:
                fan_in = p.shape[1:].numel() if p.dim() == 2 else p.shape[-1]
                p.copy_(noise * fan_in**-0.5)
            elif parameter_name.endswith(("dt_bias", "dt_proj.bias")):
                p.copy_(noise - 2.0)
            elif "norm" in parameter_name or parameter_name.endswith(".D"):
                p.copy_(1.0 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model.eval().to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=generator)


def mixer_of(model: Any) -> Any:
    """The model's first SSM mixer."""
    return next(m for m in model.modules() if hasattr(m, "A_log"))


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as the keyword its next call takes."""
    key = "cache_params" if "cache_params" in output else "past_key_values"
    return {key: output[key]}
