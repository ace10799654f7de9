"""Folders of recursive models: the same bits back, and no folder that lacks some goes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from effinfer.loading import empty_model, load_model
from effinfer.models import demo_path
from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.recursive.models import random_tokens, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(kv_policy="first").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_path()).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@torch.no_grad()
def test_same_bits(folder: Path):
    model, _ = load_model(str(folder))
    saved = tiny_model(kv_policy="first")
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in model.state_dict().items())
    ids = random_tokens(2, 8)
    assert torch.equal(model(ids).logits, saved(ids).logits)


def test_described_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    model = empty_model(folder)
    assert type(model) is RecursiveForCausalLM
    assert all(p.is_meta for p in model.parameters())


def test_more_loops_than_there_are_weights_for(folder: Path):
    edit_config(folder, loops=4)
    with pytest.raises(ValueError, match=r"lacks weights: model\.loops\.3\..* and \d+ more"):
        load_model(folder)


def test_weights_of_another_shape(folder: Path):
    edit_config(folder, lora_rank=2)
    with pytest.raises(RuntimeError, match="mismatch"):
        load_model(folder)


def test_a_missing_weight_is_named(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.loops.2.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model\.loops\.2\.norm\.weight$"):
        load_model(folder)


def test_hostile_config(folder: Path):
    edit_config(folder, block_layers=10**12)
    with pytest.raises(ValueError, match="block_layers must be in"):
        load_model(folder)
