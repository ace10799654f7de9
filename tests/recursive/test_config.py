"""Configurations from strangers: built as they say, or refused with ValueError or TypeError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import effinfer
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.recursive.models import tiny_config

REFUSED = [
    ({"loops": 0}, r"loops must be in 1 \.\. 256, got 0"),
    ({"loops": 10**9}, "loops must be in"),
    ({"block_layers": -1}, "block_layers must be in"),
    ({"block_layers": 2.0}, "block_layers must be an int, got 2.0"),
    ({"r_min": 4}, r"r_min must be in 1 \.\. 3, got 4"),
    ({"lora_rank": True}, "lora_rank must be an int, got True"),
    ({"lora_rank": -1}, "lora_rank must be in"),
    ({"vocab_size": 2**40}, "vocab_size must be in"),
    ({"hidden_size": "24"}, "hidden_size must be an int, got '24'"),
    ({"hidden_size": 26}, "hidden_size must be a multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
    ({"head_dim": 7}, "head_dim must be even, got 7"),
    ({"kv_policy": "shared"}, "kv_policy must be one of depth, first, got 'shared'"),
    ({"kv_policy": ["depth"]}, "kv_policy must be one of"),
    ({"sliding_window": 0}, "sliding_window must be in"),
    ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be in"),
    ({"initializer_range": "big"}, "initializer_range must be a number"),
    ({"qk_norm": 1}, "qk_norm must be a bool"),
    ({"num_hidden_layers": 5}, "num_hidden_layers must be 6"),
    ({"eos_token_id": 61}, r"eos_token_id must be in 0 \.\. 60, got 61"),
    ({"eos_token_id": [1, -2]}, "eos_token_id must be in"),
    ({"rope_parameters": [1]}, "rope_parameters must be a dict"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type must be one of default, linear"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        r"rope_parameters\['rope_theta'\] must be positive",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "must have 'original_max_position_embeddings' for 'yarn'",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor must be 1",
    ),
    ({"exit": "margin"}, "exit must be a dict or None"),
    ({"exit": {"threshold": 1.0}}, r"exit\['policy'\] must be a string"),
    ({"exit": {"policy": "margin", "threshold": "x"}}, r"exit\['threshold'\] must be a number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_config(**changes)


def test_derived_fields():
    config = tiny_config(num_key_value_heads=None, loops=2)
    assert (config.num_key_value_heads, config.head_dim, config.num_hidden_layers) == (4, 6, 4)
    assert [config.cache_layer(loop, j) for loop in (0, 1) for j in (0, 1)] == [0, 1, 2, 3]
    first = tiny_config(kv_policy="first")
    assert (first.kv_planes, first.num_hidden_layers) == (1, 2)
    assert [first.cache_layer(loop, 1) for loop in range(3)] == [1, 1, 1]


def test_survives_json(tmp_path: Path):
    effinfer.register_with_transformers()
    config = tiny_config(
        exit={"policy": "margin", "threshold": 0.25, "agreement": 0.99, "confidence": 0.95},
        rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0},
        r_min=2,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is RecursiveConfig
    assert again.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63)]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "rope_theta", "factor", "policy", "threshold"]),
        st.one_of(st.integers(-1, 9), st.floats(), st.sampled_from(["linear", "yarn", "x"])),
        max_size=3,
    ),
)
FIELDS = [name for name in RecursiveConfig.__annotations__ if hasattr(RecursiveConfig, name)]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), junk, min_size=1, max_size=3))
def test_hostile_json_is_built_or_refused(changes: dict[str, Any]):
    fields = {"num_hidden_layers": None} | changes
    hostile = json.loads(json.dumps(tiny_config().to_dict() | fields))
    try:
        config = RecursiveConfig.from_dict(hostile)
    except (ValueError, TypeError):
        return
    with torch.device("meta"):
        model = RecursiveForCausalLM(config)
    assert len(model.model.loops) == config.loops
