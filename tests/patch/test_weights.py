"""The packed copies follow the weights, and never reach a checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import effinfer

from .models import tiny_model, tokens


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(1, 6)).logits


def _in_place(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def _load(model: Any) -> None:
    other = tiny_model("mamba", seed=1)
    model.load_state_dict(other.state_dict())


def _assign(model: Any) -> None:
    model.load_state_dict(tiny_model("mamba", seed=1).state_dict(), assign=True)
    model.tie_weights()


def _cast(model: Any) -> None:
    model.to(torch.bfloat16)


def _cast_and_back(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _replace_parameter(model: Any) -> None:
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.detach() * 2)


CHANGES = [_in_place, _load, _assign, _cast, _cast_and_back, _replace_parameter]


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: Callable[[Any], None], called_before: bool) -> None:
    model = tiny_model("mamba")
    effinfer.patch(model)
    if called_before:
        _logits(model)
    change(model)
    got = _logits(model)
    fresh = copy.deepcopy(model)
    effinfer.unpatch(fresh)
    effinfer.patch(fresh)
    assert torch.equal(got, _logits(fresh))


def test_loading_into_a_compiled_model_is_noticed() -> None:
    model = tiny_model("mamba")
    effinfer.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return compiled(tokens(1, 6), use_cache=False).logits

    before = logits()
    _load(model)
    after = logits()
    assert not torch.allclose(before, after, rtol=1e-2)
    torch.testing.assert_close(after, _logits(model), rtol=1e-4, atol=1e-5)


def test_packed_weights_stay_out_of_the_state_dict() -> None:
    model = tiny_model("mamba")
    keys, parameters = list(model.state_dict()), list(model.parameters())
    effinfer.patch(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert any("_effinfer_packed" in name for name, _ in model.named_buffers())
    effinfer.unpatch(model)
    assert not any("_effinfer" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_lie_end_to_end(dtype: torch.dtype) -> None:
    model = tiny_model("mamba", dtype, hidden_size=256)
    keys = list(model.state_dict())
    stock = _logits(model)
    effinfer.patch(model)
    want = _logits(model)
    layers = [m for m in model.modules() if hasattr(m, "_effinfer_packed")]
    packed = [m._effinfer_packed for m in layers]
    assert len({p.untyped_storage().data_ptr() for p in packed}) == 1
    assert packed[0].data_ptr() % 2**21 == 0
    assert all(p.data_ptr() % 64 == 0 for p in packed)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    for layer in layers:
        layer.on_patch()  # a packed copy by itself
    assert torch.equal(_logits(model), want)
    assert torch.equal(_logits(twin), want)
    effinfer.unpatch(model)
    assert torch.equal(_logits(model), stock)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_model("mamba")
        want = _logits(model)
        effinfer.patch(model)
    torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-5)


def test_patched_in_inference_mode_runs_outside_it() -> None:
    model = tiny_model("mamba")
    with torch.inference_mode():
        effinfer.patch(model)
        want = _logits(model)
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 6)).logits, want)


def test_a_whole_patched_model_pickles() -> None:
    model = tiny_model("mamba")
    effinfer.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(_logits(again), _logits(model))
    assert effinfer.unpatch(again) == effinfer.unpatch(model)
