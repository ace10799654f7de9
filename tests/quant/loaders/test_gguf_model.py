"""A Llama and a Mamba in GGUF files: every parameter is what transformers' own GGUF code makes of it."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.loaders import GGML_TYPES, load_quantized
from effinfer.quant.loaders.assemble import meta_model
from tests.quant.loaders.logits import check_logits
from tests.quant.loaders.test_ggml import HALVES, random_blocks

HIDDEN, INNER, VOCAB, KV = 256, 512, 32, 128
MATRICES = {  # rows, columns and ggml type
    "attn_q": (HIDDEN, HIDDEN, 12),
    "attn_k": (KV, HIDDEN, 14),
    "attn_v": (KV, HIDDEN, 10),
    "attn_output": (HIDDEN, HIDDEN, 11),
    "ffn_gate": (INNER, HIDDEN, 2),
    "ffn_up": (INNER, HIDDEN, 34),
    "ffn_down": (HIDDEN, INNER, 8),
}


def blocks(rows, columns, type_id, seed):
    """Random blocks with scales small enough for a forward pass."""
    type = GGML_TYPES[type_id]
    data = random_blocks(type, rows, columns // type.block, seed).reshape(-1, type.block_bytes)
    for at in HALVES[type.name]:
        small = np.random.default_rng(seed).standard_normal(len(data)) * 1e-3
        data[:, at : at + 2] = small.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def write_llama(path, leave_out=(), extra=(), layers=1):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + i) for i in range(26)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "th", "the", "Ġ"])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = {"token_embd": (VOCAB, HIDDEN, 8), "output": (VOCAB, HIDDEN, 14)}
    for layer in range(1):
        tensors |= {f"blk.{layer}.{name}": matrix for name, matrix in MATRICES.items()}
    for seed, (name, (rows, columns, type)) in enumerate((tensors | dict(extra)).items()):
        if name not in leave_out:
            raw = blocks(rows, columns, type, seed)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(type))
    norms = [f"blk.{i}.{norm}" for i in range(1) for norm in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        if name not in leave_out:
            writer.add_tensor(f"{name}.weight", np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_mamba(path):
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(16)
    writer.add_ssm_time_step_rank(32)
    matrices = {
        "token_embd": (VOCAB, HIDDEN, 8),
        "blk.0.ssm_in": (2 * INNER, HIDDEN, 12),
        "blk.0.ssm_x": (64, INNER, 14),
        "blk.0.ssm_dt": (INNER, 32, 8),
        "blk.0.ssm_out": (HIDDEN, INNER, 13),
    }
    for seed, (name, (rows, columns, type)) in enumerate(matrices.items()):
        raw = blocks(rows, columns, type, seed)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(type))
    rng = np.random.default_rng(0)
    for name, shape in {
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ssm_a": (INNER, 16),
        "blk.0.ssm_d": (INNER,),
        "blk.0.ssm_conv1d.weight": (INNER, 4),
        "blk.0.ssm_conv1d.bias": (INNER,),
        "blk.0.ssm_dt.bias": (INNER,),
    }.items():
        values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        writer.add_tensor(name, -values if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("write", "layers"), [(write_llama, 8), (write_mamba, 4)])
def test_every_parameter_is_transformers(tmp_path, write, layers):
    path = write(tmp_path / "model.gguf")
    model = load_quantized(path)
    empty = meta_model(path, model.config)
    reference = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    missing, unexpected = plain.load_state_dict(reference, strict=False)
    assert set(missing) <= set(plain.all_tied_weights_keys)
    assert not unexpected
    plain.tie_weights()
    for name, expected in plain.state_dict().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, LowBitLinear) and name.endswith(".weight"):
            assert torch.equal(layer.lowbit_weight().dequantize(), expected), name
        else:
            assert torch.equal(model.state_dict()[name], expected), name
    assert sum(isinstance(m, LowBitLinear) for m in model.modules()) == layers
    check_logits(model, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2**32 - 1}, "the number of layers must be at most its 12 tensors, got 429496"),
        ({"leave_out": ("blk.0.attn_norm",)}, "'model.layers.0.input_layernorm.weight' is missing"),
        ({"leave_out": ("blk.0.ffn_up",)}, "'model.layers.0.mlp.up_proj.weight' is missing"),
        ({"extra": (("blk.9.ffn_up", (32, 256, 8)),)}, "'blk.9.ffn_up.weight' fits no parameter"),
        ({"extra": (("output", (VOCAB, 512, 14)),)}, r"lm_head must have shape \(32, 256\)"),
    ],
)
def test_files_that_do_not_add_up(tmp_path, options, message):
    path = write_llama(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        load_quantized(path)


def test_an_architecture_transformers_lacks(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture rwkv7 is not supported"):
        load_quantized(tmp_path / "model.gguf")
