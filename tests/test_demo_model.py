"""The language model in the wheel: stock transformers loads it, and it has learnt its text."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM

from effinfer.models import demo_path

EXCERPT = Path(__file__).parent / "data" / "held_out.rst.txt"
# Per token of the excerpt: the shipped weights reach 19.9, an untrained model about 2100.
PERPLEXITY_BOUND = 24


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Any attempt to connect fails the test that makes it."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the carried model must load without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield


@pytest.fixture(scope="module")
def tokenizer(offline: None):
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture(scope="module")
def model(offline: None) -> MambaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(demo_path()).eval()


def perplexity(model: MambaForCausalLM, tokenizer) -> float:
    """Of every token of the excerpt, after an end-of-text token."""
    text = tokenizer.eos_token + EXCERPT.read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    return math.exp(model(ids, labels=ids, use_cache=False).loss.item())


def test_files_are_small() -> None:
    assert sum(f.stat().st_size for f in demo_path().iterdir()) <= 4_000_000


def test_weights_are_float16_tied_and_computed_in_float32(model: MambaForCausalLM) -> None:
    stored = load_file(demo_path() / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert "lm_head.weight" not in stored
    assert type(model) is MambaForCausalLM
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_predicts_held_out_text(model: MambaForCausalLM, tokenizer) -> None:
    torch.manual_seed(0)
    untrained = MambaForCausalLM(model.config).eval()
    assert perplexity(model, tokenizer) < PERPLEXITY_BOUND
    assert perplexity(untrained, tokenizer) > 5 * PERPLEXITY_BOUND


def test_greedy_text_is_deterministic(model: MambaForCausalLM, tokenizer) -> None:
    prompt = tokenizer(".. function:: ", return_tensors="pt")
    runs = [model.generate(**prompt, max_new_tokens=24, do_sample=False) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("text", ["", "for x in y:\n\tpass  # na\u00efve \U0001f40d\r\n", " a  b "])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text
