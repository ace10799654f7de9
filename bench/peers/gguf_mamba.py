"""Writes a transformers Mamba or Mamba-2 model as a float32 GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.peers.common import peers_dir

# transformers' tensor name within a layer -> GGUF's; A_log and norms need work, see _convert
LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def _convert(name: str, weight: torch.Tensor, groups: int) -> np.ndarray:
    if name == "mixer.A_log":
        weight = -torch.exp(weight)
    if name in ("mixer.A_log", "mixer.D") and weight.ndim == 1 and groups:
        weight = weight[:, None]  # Mamba-2 keeps one scalar a head as a column
    if name == "mixer.conv1d.weight":
        weight = weight.squeeze(1)
    if name == "mixer.norm.weight":
        weight = weight.view(groups, -1)
    return weight.detach().float().contiguous().numpy()


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Mamba keeps D as a vector, Mamba-2 as a column: `groups` is 0 for Mamba."""
    peers_dir()
    import gguf

    config = model.config
    groups = getattr(config, "n_groups", 0)
    inner = getattr(config, "intermediate_size", None) or int(config.expand * config.hidden_size)
    writer = gguf.GGUFWriter(str(path), "mamba2" if groups else "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads if groups else int(config.time_step_rank))
    if groups:
        writer.add_ssm_group_count(groups)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")

    state = model.state_dict()
    writer.add_tensor("token_embd.weight", _convert("", state["backbone.embeddings.weight"], 0))
    writer.add_tensor("output_norm.weight", _convert("", state["backbone.norm_f.weight"], 0))
    if not torch.equal(state["lm_head.weight"], state["backbone.embeddings.weight"]):
        writer.add_tensor("output.weight", _convert("", state["lm_head.weight"], 0))
    for name, weight in state.items():
        if name.startswith("backbone.layers."):
            layer, _, rest = name.removeprefix("backbone.layers.").partition(".")
            writer.add_tensor(f"blk.{layer}.{LAYER_NAMES[rest]}", _convert(rest, weight, groups))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
