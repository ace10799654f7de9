"""Prompts of which only the last logits are asked for: the same bits from less work."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import effinfer
from effinfer.patch.mixers import CachedMixer

from .models import PURE_SSM, SIZES, cache_of, tiny_model, tokens


@functools.cache
def _patched(family: str) -> Any:
    model = tiny_model(family, use_bias=family == "mamba2")
    effinfer.patch(model, strict=True)
    return model


def _states(output: Any) -> list[torch.Tensor]:
    (cache,) = cache_of(output).values()
    return [s for layer in cache.layers for s in (layer.conv_states[0], layer.recurrent_states[0])]


@pytest.mark.parametrize("keep", [1, 3, 50])
@pytest.mark.parametrize(("batch", "length"), [(2, 5), (5, 100), (1, 900), (3, 1)])
@pytest.mark.parametrize("family", PURE_SSM)
def test_last_block_gives_only_the_tokens_read(
    family: str, batch: int, length: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _patched(family)
    ids = tokens(batch, length)
    mix = CachedMixer.mix
    given: list[int] = []

    def spy(*args: Any) -> torch.Tensor:
        output = mix(*args)
        given.append(output.shape[1])
        return output

    with torch.inference_mode():
        whole = model(ids, use_cache=True)
        monkeypatch.setattr(CachedMixer, "mix", spy)
        last = model(ids, use_cache=True, logits_to_keep=keep)
    assert given == [length, length, min(keep, length)]
    assert torch.equal(last.logits, whole.logits[:, -keep:])
    assert all(map(torch.equal, _states(last), _states(whole)))


@pytest.mark.parametrize("family", PURE_SSM)
def test_scratch_of_inference_mode_serves_outside_it(family: str) -> None:
    model, ids = _patched(family), tokens(1, 6)

    def generate(mode: Any) -> torch.Tensor:
        with mode:
            return model.generate(ids, max_new_tokens=4, do_sample=False)

    with ThreadPoolExecutor(1) as new_thread:  # whose scratch is made by the first of these
        inference, no_grad = new_thread.map(generate, (torch.inference_mode(), torch.no_grad()))
    assert torch.equal(inference, no_grad)


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.tensor([[0] * 9 + [1] * 15])}])
def test_continued_and_padded_prompts(options: dict[str, torch.Tensor]) -> None:
    model, ids = _patched("mamba"), tokens(1, 24)
    logits = []
    for keep in (0, 2):
        with torch.inference_mode():
            head = model(ids, use_cache=True, logits_to_keep=keep, **options)
            logits.append(model(ids, use_cache=True, logits_to_keep=keep, **cache_of(head)).logits)
    assert torch.equal(logits[0][:, -2:], logits[1])


@pytest.mark.parametrize("where", ["backbone", "backbone.layers.2", "backbone.norm_f"])
def test_hooks_see_every_token(where: str) -> None:
    model, ids = _patched("mamba2"), tokens(2, 24)
    seen: list[Any] = []
    hook = model.get_submodule(where).register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.inference_mode():
        hooked = model(ids, logits_to_keep=1)
        hook.remove()
        assert torch.equal(model(ids, logits_to_keep=1).logits, hooked.logits)
    shown = seen[0] if torch.is_tensor(seen[0]) else seen[0][0]
    assert shown.shape == (2, 24, SIZES["hidden_size"])


def test_hidden_states_are_those_of_every_token() -> None:
    model, ids = _patched("mamba"), tokens(2, 24)
    with torch.inference_mode():
        want = model(ids, output_hidden_states=True)
        got = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert torch.equal(got.logits, want.logits[:, -1:])
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))


def test_an_error_leaves_later_calls_alone() -> None:
    model, ids = _patched("mamba"), tokens(1, 8)
    with torch.inference_mode():
        with pytest.raises(IndexError):
            model(ids + 10**6, logits_to_keep=1)
        assert model.backbone(ids).last_hidden_state.shape[1] == 8
