"""The recursive model's definition: by hand, through caches, and as transformers expects it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.recursive.models import random_tokens, tiny_config, tiny_model

VARIANTS = [
    pytest.param({"kv_policy": "depth"}, id="depth"),
    pytest.param({"kv_policy": "first"}, id="first"),
    pytest.param({"kv_policy": "depth", "sliding_window": 4}, id="depth-window"),
    pytest.param({"kv_policy": "first", "sliding_window": 4}, id="first-window"),
    pytest.param({"loops": 2, "lora_rank": 0}, id="two-loops-rank-0"),
]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-6 * b.norm())


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RecursiveForCausalLM:
    return tiny_model(**request.param)


def test_one_token_by_hand():
    """Hidden size 2, one layer, two loops: attention of one token is its value, the MLP is off."""
    config = tiny_config(
        **{"vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "rms_norm_eps": 1e-30},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "block_layers": 1, "loops": 2},
        **{"lora_rank": 1, "qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False},
    )
    model = RecursiveForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight.copy_(torch.eye(2))
        attention.o_proj.weight.copy_(torch.eye(2))
        second = model.model.loops[1].layers[0].o_proj
        second.lora_A.copy_(torch.tensor([[1.0, 0.0]]))
        second.lora_B.copy_(torch.tensor([[0.0], [1.0]]))
        first, last = model(torch.tensor([[0]]), output_loop_logits=True).loop_logits
    # Loop 0: (1, 1) + norm (1, 1) = (2, 2). Loop 1: (2, 2) + (1, 1) + (0, 1) = (3, 4).
    torch.testing.assert_close(first, torch.tensor([[[2.0, 0.0]]]))
    torch.testing.assert_close(last, torch.tensor([[[7.0, -1.0]]]) / math.sqrt(12.5))


@torch.no_grad()
def test_chunks_through_a_cache_equal_one_forward(model: RecursiveForCausalLM):
    ids = random_tokens(2, 13)
    whole = model(ids, use_cache=False, output_loop_logits=True)
    cache, parts = None, []
    for chunk in ids.split([5, 1, 1, 6], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True, output_loop_logits=True)
        cache = output.past_key_values
        parts.append(output.loop_logits)
    for loop, expected in enumerate(whole.loop_logits):
        assert close(torch.cat([part[loop] for part in parts], 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("kv_policy", ["depth", "first"])
def test_generate_leaves_each_depths_keys_and_values_as_one_forward_does(kv_policy: str):
    model = tiny_model(kv_policy=kv_policy)
    generated = model.generate(
        random_tokens(2, 6), max_new_tokens=7, do_sample=False, return_dict_in_generate=True
    )
    ids = generated.sequences[:, :-1]  # the last token was never an input
    expected = model(ids, use_cache=True).past_key_values
    layers = generated.past_key_values.layers
    assert len(layers) == len(expected.layers) == model.config.num_hidden_layers
    assert len(layers) == (6 if kv_policy == "depth" else 2)
    for ours, theirs in zip(layers, expected.layers, strict=True):
        assert ours.keys.shape == (2, 2, 12, 6)
        assert close(ours.keys, theirs.keys)
        assert close(ours.values, theirs.values)
    planes = torch.stack([layer.values for layer in layers[::2]])
    assert all(not close(a, b) for a, b in itertools.pairwise(planes))


@torch.no_grad()
def test_generate_equals_repeated_forwards(model: RecursiveForCausalLM):
    ids = random_tokens(1, 5)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        token = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_padding_changes_nothing(model: RecursiveForCausalLM):
    ids = random_tokens(1, 6)
    padded = torch.cat([random_tokens(1, 3, seed=9), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert close(logits[:, 3:], model(ids, use_cache=False).logits)


@torch.no_grad()
def test_fewer_loops_are_the_first_ones(model: RecursiveForCausalLM):
    ids = random_tokens(2, 7)
    every = model(ids, output_loop_logits=True).loop_logits
    assert len(every) == model.config.loops
    assert not close(every[0], every[-1])
    for loops, expected in enumerate(every, start=1):
        assert torch.equal(model(ids, num_loops=loops).logits, expected)


@torch.no_grad()
def test_logits_to_keep(model: RecursiveForCausalLM):
    ids = random_tokens(2, 7)
    logits = model(ids).logits
    assert close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


@torch.enable_grad()
def test_training_computes_the_same_and_reaches_every_parameter(model: RecursiveForCausalLM):
    ids = random_tokens(2, 9)
    expected = model(ids, labels=ids)
    model.train()
    output = model(ids, labels=ids, output_loop_logits=True)
    assert close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    sum(logits.square().sum() for logits in output.loop_logits).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_first_keeps_no_projections_it_would_not_use():
    model = tiny_model(kv_policy="first")
    names = [name for name, _ in model.named_parameters() if name.startswith("model.loops.1.")]
    assert not any("k_proj" in name or "v_proj" in name or "k_norm" in name for name in names)
    assert any("q_proj" in name for name in names)


def test_bad_arguments():
    model = tiny_model()
    ids = random_tokens(1, 4)
    with pytest.raises(ValueError, match=r"num_loops must be in 1 \.\. 3, got 4"):
        model(ids, num_loops=4)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 4, 24))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
