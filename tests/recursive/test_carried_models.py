"""The recursive language models in the wheel: they load offline and have learnt to exit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import effinfer
from effinfer import SamplingParams
from effinfer.loading import load_model
from effinfer.models import RECURSIVE_LOOPS, recursive_demo_path
from effinfer.recursive.modeling import RecursiveForCausalLM

# Untrained 1024; the first loop, which is the worst, reaches 22.6 here with R = 2, 23.7 with R = 4.
PERPLEXITY_BOUND = 28
EXCERPT = Path(__file__).parents[1] / "data" / "held_out.rst.txt"


@pytest.fixture(scope="module", params=RECURSIVE_LOOPS, ids=lambda loops: f"R={loops}")
def loops(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def loaded(loops: int) -> tuple[RecursiveForCausalLM, Any]:
    return load_model(recursive_demo_path(loops))


@pytest.fixture(scope="module")
def judged(loaded: tuple[RecursiveForCausalLM, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (loops, T - 1, vocab) over the start of the held-out excerpt, and the next tokens."""
    model, tokenizer = loaded
    ids = tokenizer(tokenizer.eos_token + EXCERPT.read_text("utf-8"), return_tensors="pt").input_ids
    ids = ids[:, : model.config.max_position_embeddings]
    with torch.no_grad():
        logits = model(ids, use_cache=False, output_loop_logits=True).loop_logits
    return torch.cat(logits)[:, :-1], ids[0, 1:]


def test_is_small_float16_and_described(loops: int):
    folder = recursive_demo_path(loops)
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4_000_000
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert "lm_head.weight" not in stored
    assert "held-out nats per token, by loop" in (folder / "README.md").read_text("utf-8")


def test_shape(loops: int, loaded: tuple[RecursiveForCausalLM, Any]):
    config = loaded[0].config
    assert (config.loops, config.block_layers, config.lora_rank) == (loops, 2, 8)
    assert config.kv_policy == "depth"
    assert loaded[0].dtype == torch.float32
    norms = [loop.norm.weight for loop in loaded[0].model.loops]
    assert all(not torch.equal(norms[0], other) for other in norms[1:])


def test_transformers_loads_it_once_registered(loops: int):
    effinfer.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(recursive_demo_path(loops), local_files_only=True)
    assert type(model) is RecursiveForCausalLM


def test_every_loop_predicts_held_out_text(judged: tuple[torch.Tensor, torch.Tensor]):
    logits, targets = judged
    perplexities = [math.exp(F.cross_entropy(each, targets)) for each in logits]
    assert max(perplexities) < PERPLEXITY_BOUND


def test_early_loops_agree_with_full_depth(judged: tuple[torch.Tensor, torch.Tensor]):
    top = judged[0].argmax(-1)
    agreement = (top == top[-1]).float().mean(-1)
    assert agreement[:-1].min() > 0.65  # 0.71 with R = 4, 0.77 with R = 2


def test_sure_exits_are_right(judged: tuple[torch.Tensor, torch.Tensor]):
    """The margin between the two likeliest tokens after one loop tells which can exit."""
    first, last = judged[0][0].softmax(-1), judged[0][-1]
    likeliest = first.topk(2).values
    sure = likeliest[:, 0] - likeliest[:, 1] > 0.5
    assert sure.float().mean() > 0.05
    assert (first.argmax(-1) == last.argmax(-1))[sure].float().mean() > 0.95


def test_stored_exits_are_calibrated(
    loops: int, loaded: tuple[RecursiveForCausalLM, Any], judged: tuple[torch.Tensor, torch.Tensor]
):
    stored = loaded[0].config.exit
    assert (stored["policy"], stored["agreement"], stored["confidence"]) == ("margin", 0.99, 0.95)
    top, margins = judged[0].argmax(-1), judged[0].softmax(-1).topk(2).values
    sure = margins[..., 0] - margins[..., 1] > stored["threshold"]
    sure[-1] = True
    exits = sure.int().argmax(0)
    right = top.gather(0, exits[None])[0] == top[-1]
    assert right.float().mean() > 0.975  # 0.988 of these 511 tokens
    assert exits.float().mean() + 1 < 0.9 * loops  # 1.65 of 2, 3.01 of 4


def test_exit_mode_needs_no_policy(loops: int, loaded: tuple[RecursiveForCausalLM, Any]):
    model, tokenizer = loaded
    with effinfer.Engine(model, tokenizer, mode="exit") as engine:
        (output,) = engine.generate(["The :mod:`json` module"], SamplingParams(max_tokens=24))
    assert 1 < sum(output.depths) / len(output.depths) < loops


def test_unknown_number_of_loops():
    with pytest.raises(ValueError, match="loops must be 2 or 4, got 3"):
        recursive_demo_path(3)
