"""The Hugging Face runner: equal to transformers, and the same bits whatever shares a launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import effinfer
from effinfer import UnsupportedModelError
from effinfer.engine.hf_runner import HFRunner
from effinfer.engine.runner import make_runner
from tests.conftest import assert_close
from tests.engine.runners import Driver, prompts, serial, tiny
from tests.patch.models import FAMILIES as SSM
from tests.patch.models import tiny_model

LENGTHS = (19, 9, 14)
ATTENTION = {
    "gemma2": {"head_dim": 16, "sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "phi3": {},
    "olmo2": {},
}  # fmt: skip


def build(name):
    return tiny_model(name) if name in SSM else tiny(name, **ATTENTION[name])


@pytest.mark.parametrize("name", [*SSM, *ATTENTION])
def test_chunks_and_decode_rows_together_are_the_model(name):
    model, sequences = build(name), prompts(*LENGTHS)
    config, classes = model.config, [type(module) for module in model.modules()]
    weights = list(model.parameters())
    with effinfer.patched(model):  # in one forward, as the stock Mamba-1 is right too
        whole = [serial(model, tokens) for tokens in sequences]
    runner = make_runner(model)
    assert isinstance(runner, HFRunner)
    for got, want in zip(Driver(runner, sequences).run(), whole, strict=True):
        assert_close(got[0], want.double(), 1e-5)
    runner.close()
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert model.config is config
    assert all(m.config is config for m in model.modules() if "config" in m.__dict__)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", SSM)
def test_order_changes_no_bit(name):
    model, sequences = tiny_model(name), prompts(6, 1, 11, 6)
    runner = make_runner(model)
    logits = []
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        driver = Driver(runner, [sequences[i] for i in order])
        driver.feed_all(4)
        logits.append(dict(zip(order, driver.run(chunk=1), strict=True)))
    for index in range(len(sequences)):
        assert torch.equal(logits[0][index], logits[1][index])


def test_a_state_is_read_in_one_slot_and_written_in_another():
    runner, tokens = make_runner(tiny_model("mamba2")), prompts(9)[0]
    want = Driver(runner, [tokens]).run()[0][0]
    driver = Driver(runner, [tokens])
    driver.launch_tokens(0, 0, 5, wanted=[], states=(-1, 1))
    first = driver.launch_tokens(0, 5, 9, wanted=range(4), states=(1, 0))
    again = driver.launch_tokens(0, 5, 9, wanted=range(4), states=(1, 2))
    assert torch.equal(first, again)
    assert_close(first, want[5:].double(), 1e-5)
    runner.copy_states(driver.pair(1, 0))
    assert torch.equal(driver.launch_tokens(0, 5, 9, wanted=range(4), states=(0, 0)), first)


def test_a_model_in_a_runner_is_not_for_other_use():
    model = tiny("gemma2", **ATTENTION["gemma2"])
    runner = make_runner(model)
    with pytest.raises(RuntimeError, match="belongs to an engine's runner"):
        serial(model, [1, 2, 3])
    runner.close()
    assert torch.isfinite(serial(model, [1, 2, 3])).all()


def refused(model, **options):
    before = [type(module) for module in model.modules()], getattr(model, "config", None)
    with pytest.raises(UnsupportedModelError) as error:
        make_runner(model, **options)
    assert before == ([type(module) for module in model.modules()], getattr(model, "config", None))
    return str(error.value)


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
def test_stock_mixers_run_through_their_own_code(name):
    model, sequences = tiny_model(name), prompts(*LENGTHS)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    runner = make_runner(model, patch=False)
    whole = [driver_logits[0] for driver_logits in Driver(runner, sequences).run()]
    runner.close()
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    for got, tokens in zip(whole, sequences, strict=True):
        assert_close(got, serial(model, tokens).double(), 1e-4)


def test_rotations_that_depend_on_other_rows_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "rope type dynamic" in refused(tiny("llama", rope_parameters=rope))


def test_every_reason_is_named():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    text = refused(tiny("llama", rope_parameters=rope).double().train())
    assert "rope type dynamic" in text
    assert "training mode" in text
    assert "torch.float64" in text


def test_a_model_that_does_otherwise_in_pieces_is_refused():
    class Meddling(nn.Module):  # mixes every row with the one before it in the launch
        def forward(self, x):
            return x + 0.1 * x.roll(1, dims=1)

    model = tiny("gemma2", **ATTENTION["gemma2"])
    model.model.norm = nn.Sequential(model.model.norm, Meddling())
    assert "in pieces" in refused(model)


def test_what_is_no_causal_lm_is_refused():
    assert "not a Hugging Face causal LM" in refused(nn.Linear(3, 3).eval())
