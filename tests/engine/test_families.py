"""Families of Hugging Face causal LMs in the engine: transformers' own greedy tokens, or a refusal
that says why. docs/engine.md has the same table, longer."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import effinfer
from effinfer import SamplingParams, UnsupportedModelError
from effinfer.engine.decoder_runner import DecoderRunner
from effinfer.engine.hf_runner import HFRunner
from tests.engine.runners import prompts, randomise
from tests.engine.test_engine_models import alone
from tests.patch.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 6
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
OLD = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
LATENT = {  # multi-head latent attention: keys of 24 numbers, values of 16
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SHARED = {  # the last two layers attend to the keys and values of layers before
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv", "conv"]}

NATIVE = {"llama": {}, "mistral": {"sliding_window": 6}, "qwen3": {"head_dim": 16}}
# What each adds to a llama: biases, soft caps, windows in some layers, partial rotary, a parallel
# residual, learned positions, mixtures of experts, latent attention, layers that share, states.
OWN_CODE = {
    "cohere2": ALTERNATING,
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 4},
    "exaone4": ALTERNATING,
    "gemma2": {"head_dim": 16, "sliding_window": 6},
    "gemma4_text": SHARED,
    "glm4": {"head_dim": 16},
    "gpt2": OLD,
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {},
    "lfm2": CONVOLUTIONS,
    "qwen3_next": {**DELTA, **FEW_EXPERTS, "head_dim": 16},
}
PATCHED = ("mamba2", "zamba2", "granitemoehybrid")
REFUSED = {
    "bloom": ({}, "takes no position_ids|attention is its own"),
    "falcon": ({}, "raise TypeError|attention is its own"),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 4}, "its attention takes s_aux"),
    "gptj": ({**OLD, "rotary_dim": 8}, "attention is its own"),
    "llama4_text": ({"head_dim": 16, "attention_chunk_size": 32}, "it has chunked attention"),
}


def build(family, changes):
    config = AutoConfig.for_model(family, **(SIZES | changes))
    return randomise(AutoModelForCausalLM.from_config(config))


def check(model, runner):
    texts = prompts(1, 21, 9)
    want = [alone(model, prompt, NEW) for prompt in texts]
    with effinfer.Engine(
        model, max_slots=2, token_budget=16, prefill_chunk=8, max_positions=64
    ) as engine:
        assert type(engine.runner) is runner
        outputs = engine.generate(texts, SamplingParams(max_tokens=NEW))
    assert [output.error for output in outputs] == [None] * len(texts)
    assert [output.tokens for output in outputs] == want
    assert [alone(model, prompt, NEW) for prompt in texts] == want  # the model as it was


@pytest.mark.parametrize("family", NATIVE)
def test_native(family):
    check(build(family, NATIVE[family]), DecoderRunner)


@pytest.mark.parametrize("family", OWN_CODE)
def test_through_the_models_own_code(family):
    check(build(family, OWN_CODE[family]), HFRunner)


@pytest.mark.parametrize("family", PATCHED)
def test_patched(family):
    check(tiny_model(family), HFRunner)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    changes, reason = REFUSED[family]
    model = build(family, changes)
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        effinfer.Engine(model)
    assert str(error.value).startswith(f"no runner for {type(model).__name__}: ")
