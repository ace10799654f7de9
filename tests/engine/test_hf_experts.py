"""Experts of Hugging Face models on packed weights: transformers' own numbers, in the memory of one copy."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from functools import partial

import pytest
import torch

import effinfer
from effinfer.engine.hf_experts import is_experts, take_over_experts
from effinfer.engine.runner import make_runner
from tests.conftest import DTYPES, assert_close
from tests.engine.runners import Driver, prompts, serial, tiny
from tests.patch.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
MOE = {"num_experts": 8, "moe_intermediate_size": 48, "num_experts_per_tok": 3}
MODELS = {
    "mixtral": partial(tiny, "mixtral", num_local_experts=4),
    "qwen2_moe": partial(tiny, "qwen2_moe", shared_expert_intermediate_size=64, **MOE),
    "qwen3_moe": partial(tiny, "qwen3_moe", head_dim=16, norm_topk_prob=True, **MOE),
    "olmoe": partial(tiny, "olmoe", num_experts=8, num_experts_per_tok=3),
    "granitemoe": partial(tiny, "granitemoe", num_local_experts=4),
    "granitemoehybrid": partial(tiny_model, "granitemoehybrid"),
    "jamba": partial(tiny_model, "jamba"),
    "nemotron_h": partial(tiny_model, "nemotron_h"),  # experts without gates, squared ReLU
    "mixtral_gelu": partial(tiny, "mixtral", num_local_experts=4, hidden_act="gelu_pytorch_tanh"),
}
# Weights transposed, with biases; an activation that is not the op's.
OWN_CODE = {
    "gpt_oss": partial(tiny, "gpt_oss", num_local_experts=4, head_dim=16),
    "mixtral_relu": partial(tiny, "mixtral", num_local_experts=4, hidden_act="relu"),
}


def experts_of(model):
    return [module for module in model.modules() if is_experts(module)]


def routed(module, rows, dtype):
    """Hidden states, and for each row two experts and their weights."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, module.config.hidden_size).to(dtype)
    index = torch.rand(rows, module.num_experts).argsort(1)[:, :2]
    return hidden, index, torch.rand(rows, 2)


def double(module):
    """transformers' own forward, expert by expert, in float64."""
    stock = copy.deepcopy(module).double()
    stock.config._experts_implementation = "eager"
    return stock


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), *(("mixtral", dtype) for dtype in DTYPES[1:])],
)
def test_transformers_own_numbers(name, dtype):
    model = MODELS[name]().to(dtype)
    stock = [double(module) for module in experts_of(model)]
    with ExitStack() as undo:
        take_over_experts(model, undo)
        for module, own in zip(experts_of(model), stock, strict=True):
            for rows in (1, 7, 50):
                hidden, index, weights = routed(own, rows, dtype)
                want = own(hidden.double(), index, weights.double())
                assert_close(module(hidden, index, weights), want)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"])
def test_every_model_runs_on_it(name):
    model, sequences = MODELS[name](), prompts(11, 1, 6)
    with effinfer.patched(model):
        whole = [serial(model, tokens) for tokens in sequences]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = make_runner(model)
    assert all("_effinfer_experts" in m.__dict__ for m in experts_of(model))
    for got, want in zip(Driver(runner, sequences).run(), whole, strict=True):
        assert_close(got[0], want.double(), 1e-5)
    runner.close()


def storages(*tensors):
    """Bytes of the memory behind them, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def held(module):
    """All memory of a module's experts."""
    packed = module.__dict__.get("_effinfer_experts")
    return storages(*module.parameters(), *(() if packed is None else (packed.up, packed.down)))


@pytest.mark.parametrize(
    ("name", "dtype"), [("mixtral", torch.bfloat16), ("nemotron_h", torch.float32)]
)
def test_the_weights_are_there_once_and_come_back_to_the_bit(name, dtype):
    model = MODELS[name]().to(dtype)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), experts_of(model)
    before = [held(module) for module in modules]
    assert all(before)
    runner = make_runner(model)
    assert [held(module) for module in modules] == before
    assert all(not p.numel() for module in modules for p in module.parameters())
    during = model.state_dict()
    assert during.keys() == saved.keys()
    assert all(torch.equal(during[key], saved[key]) for key in saved)
    runner.close()
    assert [held(module) for module in modules] == before
    after = dict(model.named_parameters())
    assert all(after[key] is parameters[key] for key in parameters)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert all("_effinfer_experts" not in module.__dict__ for module in modules)


def test_a_model_that_is_refused_has_its_weights_back():
    model = MODELS["mixtral"]()
    model.model.norm = torch.nn.Sequential(model.model.norm, Rolling())
    with pytest.raises(effinfer.UnsupportedModelError, match="in pieces"):
        make_runner(model)
    assert all(p.numel() for p in model.parameters())


class Rolling(torch.nn.Module):
    """Mixes every row with the one before it in the launch."""

    def forward(self, x):
        return x + 0.1 * x.roll(1, dims=1)


def test_layers_may_share_their_experts():
    model = MODELS["mixtral"]()
    first, second = experts_of(model)[:2]
    second.gate_up_proj = first.gate_up_proj
    want, numbers = serial(model, [5, 6, 7]), first.gate_up_proj.clone()
    runner = make_runner(model)
    assert_close(Driver(runner, [[5, 6, 7]]).run()[0][0], want.double(), 1e-5)
    assert first._effinfer_experts.up is second._effinfer_experts.up
    runner.close()
    assert first.gate_up_proj is second.gate_up_proj
    assert torch.equal(first.gate_up_proj, numbers)


@pytest.mark.parametrize(
    ("name", "reason"), [("gpt_oss", "has biases"), ("mixtral_relu", "activation is ReLU")]
)
def test_other_experts_run_by_the_models_own_code(name, reason):
    model = OWN_CODE[name]()
    modules = experts_of(model)
    arguments = routed(modules[0], 9, torch.float32)
    want = [module(*arguments) for module in modules]
    with ExitStack() as undo:
        with pytest.warns(UserWarning, match=f"own code, expert by expert: .*{reason}") as told:
            take_over_experts(model, undo)
        assert len(told) == 1
        assert all(torch.equal(m(*arguments), y) for m, y in zip(modules, want, strict=True))


def test_the_engine_runs_a_model_by_its_own_experts():
    model, tokens = OWN_CODE["mixtral_relu"](), prompts(9)[0]
    ids = torch.tensor([tokens])
    want = model.generate(ids, max_new_tokens=6)[0, len(tokens) :].tolist()
    with pytest.warns(UserWarning, match="own code"), effinfer.Engine(model) as engine:
        got = engine.generate([tokens], effinfer.SamplingParams(max_tokens=6))
    assert got[0].tokens == want
