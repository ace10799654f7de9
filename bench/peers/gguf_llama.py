"""Writes a transformers Llama model as a float32 GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.peers.common import peers_dir

# transformers' tensor name within a layer -> GGUF's
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _pairs_beside(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered: ggml rotates neighbours, transformers the head's two halves."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The weights, and the tokenizer "none": prompts come as ids."""
    peers_dir()
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")

    def add(name: str, weight: torch.Tensor) -> None:
        values: np.ndarray = weight.detach().float().contiguous().numpy()
        writer.add_tensor(f"{name}.weight", values)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    add("output", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for theirs, ours in LAYER_NAMES.items():
            weight = layer.get_parameter(f"{theirs}.weight")
            if ours in heads:
                weight = _pairs_beside(weight, heads[ours])
            add(f"blk.{index}.{ours}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
