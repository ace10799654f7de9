"""What patching relies on in transformers: one small test for each thing that may change.

Run at both ends of the allowed range of transformers.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import effinfer
from effinfer.patch.cache import read_states, write_states
from effinfer.patch.rules import MODEL_TYPES, RULES
from effinfer.patch.swap import swapped_class

from .models import FAMILIES, cache_of, mixer_of, tiny_config, tiny_model, tokens


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(MODEL_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_and_norm_has_a_rule(family: str) -> None:
    report = effinfer.patch(tiny_model(family), dry_run=True)
    assert not report.skipped
    for stock in report.fallbacks:
        assert "Norm" not in stock.module
        assert "Mamba" not in stock.module


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_have_the_attributes_replacements_use(family: str) -> None:
    for module in tiny_model(family).modules():
        rule = RULES.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if rule is None:
            continue
        for cls in rule.replacement.__mro__:
            for attribute in vars(cls).get("__annotations__", {}):
                optional = attribute.startswith("_effinfer_") or hasattr(cls, attribute)
                assert optional or hasattr(module, attribute), (rule.target, attribute)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_stock_mamba1_forgets_its_state_when_continued_by_several_tokens(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 20)

    def error() -> float:
        with torch.inference_mode():
            whole = model(ids).logits[:, 13:]
            head = model(ids[:, :13], use_cache=True)
            tail = model(ids[:, 13:], use_cache=True, **cache_of(head)).logits
        return ((tail - whole).norm() / whole.norm()).item()

    assert error() > 1e-3
    with effinfer.patched(model):
        assert error() < 5e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_keeps_what_is_written(family: str) -> None:
    config = tiny_config(family)
    mixer = mixer_of(tiny_model(family))
    cache = DynamicCache(config=config)
    assert read_states(cache, mixer.layer_idx) is None
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second write goes another way inside the cache
        conv = torch.randn(2, mixer.conv1d.in_channels, 3, generator=generator)
        ssm = torch.randn(2, *mixer.A_log.shape, 5, generator=generator)
        write_states(cache, mixer.layer_idx, conv, ssm)
        states = read_states(cache, mixer.layer_idx)
        assert states is not None
        assert states[0].shape[-1] == mixer.conv_kernel_size == 4
        assert torch.equal(states[0][..., 1:], conv)
        assert torch.equal(states[1], ssm)
        assert states[1].dtype == torch.float32


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_oldest_column_of_the_conv_state_is_not_used(family: str) -> None:
    model, ids = tiny_model(family), tokens(1, 9)
    logits = []
    for poison in (0.0, 1e6):
        with torch.inference_mode():
            head = model(ids[:, :8], use_cache=True)
            (cache,) = cache_of(head).values()
            for i in range(len(cache.layers)):
                states = read_states(cache, i)
                assert states is not None
                states[0][..., 0] = poison
            logits.append(model(ids[:, 8:], use_cache=True, **cache_of(head)).logits)
    assert torch.equal(*logits)


def test_stock_continues_a_cache_that_the_patched_model_began() -> None:
    model, ids = tiny_model("mamba", torch.bfloat16), tokens(2, 12)
    with torch.inference_mode():
        want = model(ids).logits[:, -1:]
        with effinfer.patched(model):
            head = model(ids[:, :-1], use_cache=True)
        stock_tail = model(ids[:, -1:], use_cache=True, **cache_of(head)).logits
        head = model(ids[:, :-1], use_cache=True)
        with effinfer.patched(model):
            tail = model(ids[:, -1:], use_cache=True, **cache_of(head)).logits
    for got in (stock_tail, tail):
        assert ((got - want).norm() / want.norm()).item() < 5e-2


def test_instance_forward_shadows_the_swapped_class() -> None:
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    linear.__class__ = swapped_class(RULES["torch.nn.modules.linear.Linear"].replacement, nn.Linear)
    x = torch.ones(2, 4)
    assert linear(x) is x


def test_recording_cache_is_refused() -> None:
    model, ids = tiny_model("mamba2"), tokens(1, 4)
    cache: Any = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with (
        effinfer.patched(model),
        torch.inference_mode(),
        pytest.raises(effinfer.UnsupportedOpError, match="records past states"),
    ):
        model(ids, cache_params=cache, use_cache=True)


_GLOBAL = """
import sys, torch, transformers
from tests.patch.models import tiny_model
model = tiny_model("mamba")

def state():
    return {
        (name, key): id(value)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("torch", "transformers")
        for key, value in list(vars(module).items())
    }

torch.library, torch._dynamo, torch.compiler
before = state()
import effinfer
effinfer.patch(model)
with torch.inference_mode():
    model(torch.ones(1, 3, dtype=torch.long))
effinfer.unpatch(model)
after = state()
changed = [key for key in before if after.get(key) != before[key]]
assert not changed, changed
"""


def test_nothing_in_torch_or_transformers_changes() -> None:
    subprocess.run([sys.executable, "-c", _GLOBAL], check=True, timeout=300)
