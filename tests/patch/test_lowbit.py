"""Patched models on low-bit weights: ``patch(quantize=)``, and ``patch`` after ``quantize_``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import effinfer
from effinfer import QuantConfig
from effinfer.errors import UnsupportedModelError
from effinfer.patch.direct import direct_calls

from .models import mixer_of, tiny_model, tokens

CONFIG = QuantConfig(bits=4, group_size=32)


def logits(model: Any, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(2, 12) if ids is None else ids, **options).logits


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba", "falcon_h1"])
def test_patch_quantizes_and_unpatch_restores(family: str, activations: str) -> None:
    config = QuantConfig(bits=8, group_size=32, activations=activations)
    model = tiny_model(family)
    stock, keys = logits(model), list(model.state_dict())
    parameters = list(model.parameters())
    report = effinfer.patch(model, quantize=config)
    assert sum(r.replacement == "LinearWithLowBit" for r in report.replaced) > 3
    assert "int8 weight" in str(report)
    assert "read at memory speed; float, as" in str(report)  # the output head
    assert report.bytes_after > report.bytes_before
    got = logits(model)
    assert 0 < relative(got, stock) < 0.1
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(logits(copy.deepcopy(model)), got)
    effinfer.unpatch(model)
    assert torch.equal(logits(model), stock)
    assert not any("_effinfer" in name for m in model.modules() for name in m.__dict__)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("bits", [4, 2, 1])
def test_direct_calls_are_the_modules_to_the_bit(family: str, bits: int) -> None:
    model = tiny_model(family)
    effinfer.quantize_(model, QuantConfig(bits=bits, group_size=32), progress=False)
    effinfer.patch(model)
    mixer = mixer_of(model)
    with torch.inference_mode():
        assert direct_calls(mixer, torch.zeros(1, 1, 64)) is not None
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    results = []
    for direct in (True, False):
        for m in model.modules():
            if hasattr(m, "A_log"):
                m.direct = direct
        last = logits(model, tokens(1, 40), logits_to_keep=1)
        results.append((logits(model), last, model.generate(tokens(1, 9), **options)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["mamba", "jamba", "mamba2"])
def test_quantized_then_patched_is_patched_and_quantized(family: str) -> None:
    one, two = tiny_model(family), tiny_model(family)
    effinfer.quantize_(one, CONFIG, progress=False)
    effinfer.patch(one)
    effinfer.patch(two, quantize=CONFIG)
    # The head is float32, packed in one and in the other.
    assert torch.equal(logits(one), logits(two))
    assert effinfer.unpatch(one) > 0
    assert any(isinstance(m, effinfer.nn.LowBitLinear) for m in one.modules())


def test_a_linear_that_permutes_its_input_goes_through_the_modules() -> None:
    model, plain = tiny_model("mamba"), tiny_model("mamba")
    for m in (model, plain):
        effinfer.quantize_(m, CONFIG, progress=False)
    mixer = mixer_of(model)
    mixer.in_proj.order = torch.arange(64)
    effinfer.patch(plain)
    report = effinfer.patch(model)
    assert "permutes its input" in str(report)
    with torch.inference_mode():
        assert direct_calls(mixer, torch.zeros(1, 1, 64)) is None
    assert torch.equal(logits(model), logits(plain))


def test_changed_weights_are_followed() -> None:
    model, other = tiny_model("mamba"), tiny_model("mamba", seed=1)
    effinfer.patch(model, quantize=CONFIG)
    logits(model)
    model.load_state_dict(other.state_dict())
    effinfer.patch(other, quantize=CONFIG)
    assert torch.equal(logits(model), logits(other))
    with torch.no_grad():
        for m in (model, other):
            mixer_of(m).in_proj.weight.mul_(2)
    assert torch.equal(logits(model), logits(other))


def test_calibrated_weights_must_not_change() -> None:
    model = tiny_model("mamba")
    config = QuantConfig(bits=3, group_size=32, method="gptq")
    with pytest.raises(ValueError, match="needs calibration"):
        effinfer.patch(model, quantize=config)
    assert effinfer.unpatch(model) == 0
    effinfer.patch(model, quantize=config, calibration=[tokens(2, 32)])
    logits(model)
    logits(copy.deepcopy(model))  # other addresses, the same values
    with torch.no_grad():
        mixer_of(model).in_proj.weight.mul_(2)
    with pytest.raises(UnsupportedModelError, match="changed after calibration"):
        logits(model)


def test_choices_of_patch_hold() -> None:
    model = tiny_model("mamba")
    report = effinfer.patch(model, quantize=CONFIG, exclude="*.out_proj", dry_run=True)
    low = [r.name for r in report.replaced if r.replacement == "LinearWithLowBit"]
    assert low
    assert not any(name.endswith("out_proj") for name in low)
    assert effinfer.unpatch(model) == 0
    report = effinfer.patch(model, quantize=CONFIG, features="norm")
    assert not any(r.replacement == "LinearWithLowBit" for r in report.replaced)


def test_bad_arguments_leave_the_model() -> None:
    model = tiny_model("mamba")
    stock = logits(model)
    with pytest.raises(TypeError, match="quantize must be a QuantConfig"):
        effinfer.patch(model, quantize=4)
    with pytest.raises(ValueError, match="verify"):
        effinfer.patch(model, quantize=CONFIG, verify=True)
    with pytest.raises(ValueError, match="group_size"):
        effinfer.patch(model, quantize=QuantConfig(group_size=17))
    assert torch.equal(logits(model), stock)
    effinfer.quantize_(model, CONFIG, progress=False)
    with pytest.raises(effinfer.PatchConflictError, match="low-bit layers already"):
        effinfer.patch(model, quantize=CONFIG)


def test_conv1d_of_transformers_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    stock = logits(model)
    eight = QuantConfig(bits=8, group_size=32)
    report = effinfer.patch(model, quantize=eight)
    assert [r.module for r in report.replaced].count("Conv1D") == 4
    assert 0 < relative(logits(model), stock) < 0.05
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    changed = logits(model)
    effinfer.unpatch(model)
    assert 0 < relative(changed, logits(model)) < 0.05
