"""The decoder runner: equal to transformers, and the same bits whatever shares a launch."""

from __future__ import annotations

import pytest
import torch

import effinfer
from effinfer.engine.decoder_runner import DecoderRunner
from effinfer.engine.hf_runner import HFRunner
from effinfer.engine.profile import measure_costs
from effinfer.engine.runner import make_runner
from effinfer.quant import QuantConfig, quantize_
from effinfer.quant.quantize import quantize_linear
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM
from tests.conftest import assert_close
from tests.engine.runners import FAMILIES, Driver, prompts, randomise, serial, tiny

LENGTHS = (23, 9, 17)
RECURSIVE = {
    "plain": {},
    "lora": {"lora_rank": 4},
    "first": {
        "lora_rank": 4, "kv_policy": "first", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
        "qk_norm": True,
    },
    "biased": {"qkv_bias": True, "mlp_bias": True, "sliding_window": 5, "loops": 2},
    "one_loop": {"loops": 1, "lora_rank": 3},
}  # fmt: skip


def tiny_recursive(name):
    sizes = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "block_layers": 2, "loops": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    return randomise(RecursiveForCausalLM(RecursiveConfig(**(sizes | RECURSIVE[name]))))


def run(runner, sequences, seed=0, **options):
    return Driver(runner, sequences, seed).run(**options)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_and_decode_rows_together_are_the_model(name):
    model, sequences = tiny(name), prompts(*LENGTHS)
    runner = make_runner(model)
    assert isinstance(runner, DecoderRunner)
    for got, tokens in zip(run(runner, sequences), sequences, strict=True):
        want = serial(model, tokens)
        assert_close(got[0], want.double(), 5e-6)
        assert torch.equal(got[0].argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("name", RECURSIVE)
def test_rows_of_all_depths_together_are_each_loop_of_the_model(name):
    model, sequences = tiny_recursive(name), prompts(*LENGTHS)
    runner = make_runner(model)
    assert (runner.spec.loops, runner.spec.kv_policy) == (
        model.config.loops,
        model.config.kv_policy,
    )
    for got, tokens in zip(run(runner, sequences, seed=1), sequences, strict=True):
        want = model(torch.tensor([tokens]), use_cache=False, output_loop_logits=True).loop_logits
        for loop, logits in enumerate(want):
            assert_close(got[loop], logits[0].double(), 5e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "lora", "first"])
def test_bits_ignore_what_shares_the_launch(name):
    model = tiny(name) if name in FAMILIES else tiny_recursive(name)
    runner, sequences = make_runner(model), prompts(*LENGTHS, *[6] * 61)
    together = run(runner, sequences)
    other = run(runner, sequences, seed=5, chunk=3, order=range(len(sequences) - 1, -1, -1))
    for one, two in zip(together, other, strict=True):
        assert torch.equal(one, two)
    effinfer.set_num_threads(1)
    try:
        for index in (0, 1, 40):
            assert torch.equal(run(runner, [sequences[index]])[0], together[index])
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize(
    "config", [{"bits": 4, "group_size": 32}, {"bits": 8, "activations": "f32"}]
)
def test_low_bit_weights(config):
    model, sequences = tiny("llama"), prompts(*LENGTHS)
    quantize_(model, QuantConfig(**config))
    for got, tokens in zip(run(make_runner(model), sequences), sequences, strict=True):
        # int8 codes of activations may round the other way where float32 sums differ in a bit.
        bound = 5e-6 if config.get("activations") == "f32" else 2e-2
        assert_close(got[0], serial(model, tokens).double(), bound)


def test_low_bit_weights_of_several_kinds():
    model, sequences = tiny("llama", mlp_bias=True), prompts(*LENGTHS)
    for layer in model.model.layers:
        for owner, name, bits in ((layer.self_attn, "q_proj", 8), (layer.mlp, "up_proj", 4)):
            config = QuantConfig(bits=bits, activations="f32", group_size=32)
            setattr(owner, name, quantize_linear(getattr(owner, name), config))
    for got, tokens in zip(run(make_runner(model), sequences), sequences, strict=True):
        assert_close(got[0], serial(model, tokens).double(), 5e-6)


def test_bfloat16():
    model, sequences = tiny("qwen2", torch.bfloat16), prompts(*LENGTHS)
    wide = tiny("qwen2")
    wide.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    for got, tokens in zip(run(make_runner(model), sequences), sequences, strict=True):
        assert_close(got[0], serial(wide, tokens).double(), 2e-2)


def test_keys_and_values_of_another_type():
    model, sequences = tiny("llama"), prompts(*LENGTHS)
    runner = make_runner(model, kv_dtype=torch.float16)
    assert runner.spec.bytes_per_block == make_runner(model).spec.bytes_per_block // 2
    for got, tokens in zip(run(runner, sequences), sequences, strict=True):
        assert_close(got[0], serial(model, tokens).double(), 2e-3)


def test_a_patched_model_gives_the_same_bits():
    model, sequences = tiny("llama"), prompts(*LENGTHS)
    stock = run(make_runner(model), sequences)
    with effinfer.patched(model):
        for one, two in zip(run(make_runner(model), sequences), stock, strict=True):
            assert torch.equal(one, two)


def test_only_wanted_rows_give_logits():
    runner, sequences = make_runner(tiny("llama")), prompts(12)
    everything = run(runner, sequences)[0][0]
    driver = Driver(runner, sequences)
    assert driver.launch_tokens(0, 0, 12, wanted=[]) is None
    logits = driver.launch_tokens(0, 0, 12, wanted=[3, 11])
    assert torch.equal(logits, everything[[3, 11]])


def test_hidden_states_wait_in_the_arena():
    model, tokens = tiny_recursive("plain"), prompts(7)[0]
    runner = make_runner(model)
    driver = Driver(runner, [tokens])
    driver.launch_tokens(0, 0, 7, wanted=[])
    hidden = runner.hidden(torch.arange(7, dtype=torch.int32))
    want = model.model(torch.tensor([tokens]), num_loops=1)[-1][0]
    assert_close(model.model.loops[0].norm(hidden), want.double(), 5e-6)


def test_costs_never_fall():
    runner = make_runner(tiny("llama"))
    runner.allocate(blocks=8, states=0, max_rows=24, max_slots=4)
    for costs in measure_costs(runner, 24):
        assert len(costs) == 24
        assert costs == sorted(costs)
    assert costs[0] >= 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation is gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
)
def test_other_llamas_are_not_taken(changes, reason):
    from effinfer.engine.decoder_model import describe

    assert any(reason in r for r in describe(tiny("llama", **changes)))


def test_a_hook_is_not_passed_over():
    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    runner = make_runner(model)
    assert isinstance(runner, HFRunner)
    runner.close()
