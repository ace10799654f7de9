"""A Hugging Face decoder as a recursive model: exact at full rank, nearer with more rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import effinfer
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.recursive.models import VOCABULARY, random_tokens

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 10},
}


def decoder(kind: str, layers: int = 4, **changes: Any) -> Any:
    """A random tiny decoder of this type, in eval mode."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **sizes | SHAPES.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def error(model: RecursiveForCausalLM, expected: torch.Tensor) -> float:
    """Relative error of the logits."""
    with torch.no_grad():
        logits = model(random_tokens(2, 11)).logits
    return float((logits - expected).norm() / expected.norm())


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(random_tokens(2, 11)).logits


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("init", ["stepwise", "average", "svd"])
def test_full_rank_reproduces_the_model(kind: str, init: str):
    model = decoder(kind)
    before = copy.deepcopy(model.state_dict())
    recursive = effinfer.to_recursive(model, block_layers=2, loops=2, lora_rank=24, init=init)
    assert error(recursive, logits_of(model)) <= 5e-6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not recursive.training
    assert recursive.config.eos_token_id == 2


@pytest.mark.parametrize(("block_layers", "loops"), [(1, 4), (4, 1), (2, 2)])
def test_every_cycle_reproduces_the_model(block_layers: int, loops: int):
    model = decoder("qwen3")
    recursive = effinfer.to_recursive(
        model, block_layers=block_layers, loops=loops, lora_rank=10**4
    )
    assert recursive.config.num_hidden_layers == 4
    assert error(recursive, logits_of(model)) <= 5e-6


def test_generates_the_same_text():
    model = decoder("mistral")
    recursive = effinfer.to_recursive(model, block_layers=2, loops=2, lora_rank=24)
    ids = random_tokens(2, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(recursive.generate(ids, **options), model.generate(ids, **options))


def test_more_rank_is_nearer():
    model = decoder("llama")
    expected = logits_of(model)
    errors = [
        error(effinfer.to_recursive(model, block_layers=2, loops=2, lora_rank=rank), expected)
        for rank in (0, 6, 18, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def test_layers_that_are_tied_already_lose_nothing():
    model = decoder("llama")
    for j in (0, 1):
        for part in ("self_attn", "mlp"):
            source = getattr(model.model.layers[j], part).state_dict()
            getattr(model.model.layers[j + 2], part).load_state_dict(source)
    recursive = effinfer.to_recursive(model, block_layers=2, loops=2)
    assert not any("lora" in name for name in recursive.state_dict())
    assert error(recursive, logits_of(model)) <= 1e-6


def test_stepwise_takes_layers_at_even_steps():
    model = decoder("qwen2", layers=6)
    recursive = effinfer.to_recursive(model, block_layers=3, loops=2, init="stepwise")
    for tied, layer in zip(recursive.model.layers, (0, 2, 5), strict=True):
        expected = model.model.layers[layer].mlp.up_proj.weight
        assert torch.equal(tied.mlp.up_proj.weight, expected)


def test_keeps_dtype_and_mode():
    model = decoder("llama").to(torch.bfloat16).train()
    recursive = effinfer.to_recursive(model, block_layers=2, loops=2, lora_rank=24)
    assert recursive.dtype == torch.bfloat16
    assert recursive.training
    expected = logits_of(model.eval()).float()
    assert error(recursive.eval().float(), expected) <= 0.05


@pytest.mark.parametrize("tied_head", [True, False])
def test_saved_and_reloaded_bit_for_bit(tmp_path: Path, tied_head: bool):
    model = decoder("qwen3", tie_word_embeddings=tied_head)
    recursive = effinfer.to_recursive(model, block_layers=2, loops=2, lora_rank=3)
    recursive.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors"),
    ]
    effinfer.register_with_transformers()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert type(again) is RecursiveForCausalLM
    assert type(again.config) is RecursiveConfig
    states = recursive.state_dict(), again.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied_head
    assert torch.equal(logits_of(again), logits_of(recursive))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, "model type 'gpt2' is none of llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu', not 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its rope type 'dynamic' is none of",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            "its layers mix full and sliding-window attention",
        ),
    ],
)
def test_unsupported(kind: str, changes: dict[str, Any], reason: str):
    with pytest.raises(effinfer.UnsupportedModelError, match=reason):
        effinfer.to_recursive(decoder(kind, **changes), block_layers=2, loops=2)


def test_unsupported_names_every_reason():
    model = decoder("llama", hidden_act="gelu")
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with pytest.raises(effinfer.UnsupportedModelError) as caught:
        effinfer.to_recursive(model, block_layers=2, loops=2)
    for reason in ("'gelu'", "layer 1's mlp.up_proj is a Identity", "lm_head has a bias"):
        assert reason in str(caught.value)
    with pytest.raises(effinfer.UnsupportedModelError, match="no language modelling head"):
        effinfer.to_recursive(model.model, block_layers=2, loops=2)
    with pytest.raises(effinfer.UnsupportedModelError, match="model type None"):
        effinfer.to_recursive(torch.nn.Linear(2, 2), block_layers=2, loops=2)


def test_bad_arguments():
    model = decoder("llama")
    for options, message in [
        ({"block_layers": 3, "loops": 2}, "must be the model's 4 layers, got 3 x 2"),
        ({"block_layers": 0, "loops": 2}, "block_layers must be 1 or more, got 0"),
        ({"block_layers": 2, "loops": 2, "lora_rank": -1}, "lora_rank must be 0 or more"),
        ({"block_layers": 2, "loops": 2, "init": "best"}, "init must be one of stepwise"),
    ]:
        with pytest.raises(ValueError, match=message):
            effinfer.to_recursive(model, **options)
    with pytest.raises(TypeError, match=r"loops must be an int, got 2\.0"):
        effinfer.to_recursive(model, block_layers=2, loops=2.0)
