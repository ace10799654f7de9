"""plan_bits: within its budget, optimal against brute force, and by metrics with known answers."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from effinfer.ops.lowbit_linear import pack_lowbit
from effinfer.quant import QuantConfig, rtn
from effinfer.quant.config import format_of
from effinfer.quant.costs import measure_times, packed_bytes, quantized_layers
from effinfer.quant.metrics import LossIncrease, layer_scores
from effinfer.quant.plan import METRICS, plan_bits

CHOICES = (1, 2, 3, 4, 8)
CONFIG = QuantConfig(group_size=32)
BATCH = {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)).eval()


class Tower(nn.Module):
    """Linears one after another, the third much larger in its weights' outliers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(40, 32, generator=torch.Generator().manual_seed(5))
CALLS, TOKEN_CALLS = [((X,), {})], [((), BATCH)]  # as metrics take them


def bytes_of(model: nn.Module, plan: dict) -> int:
    """What the plan's layers really take, by packing them."""
    total = 0
    for name, bits in plan.items():
        format = format_of(bits)
        weight = quantized_layers(model, CONFIG)[name].weight
        group_size = CONFIG.columns_per_scale(format, weight.shape[1])
        packed = pack_lowbit(rtn(weight, format=format, group_size=group_size))
        parts = (packed.packed, packed.scale, packed.zero, packed.offset)
        total += sum(t.nbytes for t in parts if t is not None)
    return total


@pytest.mark.parametrize("bits", [*CHOICES, 1.58, "ternary_dense"])
@pytest.mark.parametrize("symmetric", [None, True])
def test_packed_bytes_are_those_of_the_packed_tensors(bits, symmetric) -> None:
    model = llama()
    config = QuantConfig(group_size=32, symmetric=symmetric)
    total = 0
    for layer in quantized_layers(model, config).values():
        format = format_of(bits)
        group_size = config.columns_per_scale(format, layer.weight.shape[1])
        weight = rtn(layer.weight, format=format, group_size=group_size, symmetric=symmetric)
        packed = pack_lowbit(weight)
        parts = (packed.packed, packed.scale, packed.zero, packed.offset)
        total += sum(t.nbytes for t in parts if t is not None)
    assert packed_bytes(model, bits, config) == total


@pytest.mark.parametrize("metric", METRICS)
def test_never_over_budget(metric: str) -> None:
    model = llama()
    low, high = (packed_bytes(model, bits, CONFIG) for bits in (1, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = low + int(0.4 * (high - low))
    plan = plan_bits(
        model, budget, metric=metric, calibration=[BATCH], choices=(1, 2, 4, 8), config=CONFIG
    )
    assert set(plan) == set(quantized_layers(model, CONFIG))
    assert low < bytes_of(model, plan) <= budget
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert QuantConfig(plan=plan).format_for(next(iter(plan))) is not None


def test_more_bytes_more_bits() -> None:
    model = Tower().eval()
    low, high = (packed_bytes(model, bits, CONFIG) for bits in (1, 8))
    spent = []
    for share in (0.0, 0.2, 0.5, 1.0):
        budget = low + int(share * (high - low))
        plan = plan_bits(model, budget, metric="zd", choices=CHOICES, config=CONFIG)
        spent.append(bytes_of(model, plan))
        assert spent[-1] <= budget
    assert spent[0] == low
    assert spent == sorted(spent)
    assert set(plan.values()) == {8}


@functools.cache
def tower_table(metric: str) -> dict[tuple[str, int], tuple[float, int]]:
    """Sensitivity and bytes of each layer and choice, from the definitions."""
    model, table, x = Tower().eval(), {}, X
    layers = quantized_layers(model, CONFIG)
    names = list(layers)
    scores = layer_scores(metric, model, names, CALLS) if metric != "loss" else {}
    for name in names:
        layer = model.get_submodule(name)
        for bits in (2, 4, 8):
            quantized = rtn(layer.weight, format=format_of(bits), group_size=32).dequantize()
            if metric == "loss":
                loss = LossIncrease(model, CALLS, None).with_weight(layers[name], quantized)
            else:
                off, size = x @ (layer.weight - quantized).T, x @ layer.weight.T
                loss = scores[name] * float(off.square().sum() / size.square().sum())
            table[name, bits] = loss, bytes_of(model, {name: bits})
        x = layer(x)
    return table


@settings(max_examples=12, deadline=None)
@given(st.floats(0, 1), st.sampled_from(METRICS))
def test_optimal_against_brute_force(share: float, metric: str) -> None:
    model, table = Tower().eval(), tower_table(metric)
    names, choices = list(quantized_layers(model, CONFIG)), (2, 4, 8)
    low, high = (packed_bytes(model, bits, CONFIG) for bits in (2, 8))
    budget = low + int(share * (high - low))
    plan = plan_bits(model, budget, metric=metric, calibration=[X], choices=choices, config=CONFIG)

    def total(assigned, what: int):
        return sum(table[case][what] for case in zip(names, assigned, strict=True))

    every = itertools.product(choices, repeat=3)
    best = min(total(a, 0) for a in every if total(a, 1) <= budget)
    assert total(plan.values(), 1) <= budget
    assert total(plan.values(), 0) == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_the_layer_that_hurts_gets_the_bits() -> None:
    """Two layers hold values that two bits can tell apart, the third does not."""
    model = Tower().eval()
    with torch.no_grad():
        for i in (0, 2):
            codes = torch.randint(-2, 2, (32, 32), generator=torch.Generator().manual_seed(i))
            model.layers[i].weight.copy_(codes / 8)
    low, high = (packed_bytes(model, bits, CONFIG) for bits in (2, 8))
    budget = low + (high - low) // 2
    for metric in METRICS:
        plan = plan_bits(
            model, budget, metric=metric, calibration=[X], choices=(2, 8), config=CONFIG
        )
        assert plan == {"layers.0": 2, "layers.1": 8, "layers.2": 2}, metric


def test_seconds_instead_of_bytes() -> None:
    model = llama()
    shapes = {tuple(m.weight.shape) for m in quantized_layers(model, CONFIG).values()}
    times = {(n, k, bits): n * k * bits * 1e-9 + 3e-7 for n, k in shapes for bits in CHOICES}
    layers = quantized_layers(model, CONFIG).values()
    whole = sum(times[(*m.weight.shape, 3)] for m in layers)
    plan = plan_bits(
        model, budget_seconds=whole, metric="zd", choices=CHOICES, config=CONFIG, times=times
    )
    taken = math.fsum(
        times[(*model.get_submodule(n).weight.shape, bits)] for n, bits in plan.items()
    )
    assert taken <= whole
    assert set(plan.values()) != {1}


def test_times_are_measured_for_every_shape_and_choice() -> None:
    times = measure_times(llama(), (2, 8), config=CONFIG, seconds=1e-4)
    assert set(times) == {(n, k, b) for n, k in ((32, 32), (48, 32), (32, 48)) for b in (2, 8)}
    assert all(0 < seconds < 1 for seconds in times.values())


def test_head_and_excluded_layers_are_left_out() -> None:
    model = llama()
    config = QuantConfig(group_size=32, exclude=("*down_proj",))
    plan = plan_bits(model, packed_bytes(model, 4, config), metric="zd", config=config)
    assert "lm_head" not in plan
    assert not any(name.endswith("down_proj") for name in plan)


# Scores with known answers.


def test_zd_counts_the_weights_above_one_deviation() -> None:
    model = nn.Sequential(nn.Linear(10, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0] * 8 + [5.0, 5.0]]))
    assert layer_scores("zd", model, ["0"], []) == {"0": pytest.approx(0.8)}


def test_lim_is_0_where_a_block_changes_nothing_and_2_where_it_turns_round() -> None:
    class Scale(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            with torch.no_grad():
                self.inner.weight.copy_(by * torch.eye(4))

        def forward(self, x):
            return self.inner(x)

    model = nn.Sequential(Scale(3.0), Scale(-0.5), nn.Linear(4, 2)).eval()
    scores = layer_scores("lim", model, ["0.inner", "1.inner", "2"], [((torch.randn(5, 4),), {})])
    assert scores == {
        "0.inner": pytest.approx(0, abs=1e-6),
        "1.inner": pytest.approx(2, abs=1e-6),
        "2": 1.0,
    }


def test_ompq_tells_a_copy_from_a_layer_of_its_own() -> None:
    class Branches(nn.Module):
        """a and b compute the same up to scale; c something orthogonal to both."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 2, bias=False) for _ in range(3))
            with torch.no_grad():
                self.a.weight.copy_(torch.eye(4)[:2])
                self.b.weight.copy_(3 * torch.eye(4)[:2])
                self.c.weight.copy_(torch.eye(4)[2:])

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x), self.c(x)], -1)

    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    scores = layer_scores("ompq", Branches().eval(), ["a", "b", "c"], [((x,), {})])
    # a and b: alike 1 to each other, 0 to c, so 1/2 in the mean.
    assert scores["a"] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert scores["b"] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert scores["c"] == pytest.approx(1.0, rel=1e-5)


def test_lrp_shares_relevance_by_contribution() -> None:
    class Sum(nn.Module):
        """Two branches added, one contributing three quarters; then a ReLU and a norm-free end."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.act, self.end = nn.ReLU(), nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                self.a.weight.copy_(3 * torch.eye(2))
                self.b.weight.copy_(torch.eye(2))
                self.end.weight.fill_(1.0)

        def forward(self, x):
            return self.end(self.act(self.a(x) + self.b(x)))

    scores = layer_scores(
        "lrp", Sum().eval(), ["a", "b", "end"], [((torch.tensor([[1.0, 2.0]]),), {})]
    )
    assert sum(scores.values()) == pytest.approx(1)
    assert scores["a"] / scores["b"] == pytest.approx(3, rel=1e-5)
    assert scores["a"] + scores["b"] == pytest.approx(scores["end"], rel=5e-3)  # epsilon's share


@pytest.mark.parametrize("build", [llama, mamba])
def test_lrp_leaves_no_trace(build) -> None:
    """Frozen or not, no gradient is kept and no hook stays."""
    model = build().requires_grad_(False)
    names = list(quantized_layers(model, CONFIG))
    frozen = layer_scores("lrp", model, names, TOKEN_CALLS)
    scores = layer_scores("lrp", model.requires_grad_(True), names, TOKEN_CALLS)
    assert scores == pytest.approx(frozen, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(0 < score < 1 for score in scores.values())


def test_a_layer_never_called_takes_the_usual_score() -> None:
    """Mamba multiplies by dt_proj's weight without calling it."""
    model = mamba()
    names = list(quantized_layers(model, CONFIG))
    for metric in ("ompq", "lrp"):
        scores = layer_scores(metric, model, names, TOKEN_CALLS)
        others = [scores[name] for name in names if not name.endswith("dt_proj")]
        assert scores["backbone.layers.0.mixer.dt_proj"] == pytest.approx(sum(others) / len(others))
    budget = packed_bytes(model, 4, CONFIG)
    plan = plan_bits(model, budget, metric="lrp", calibration=[BATCH], config=CONFIG)
    assert bytes_of(model, plan) <= budget


def test_the_loss_is_the_one_asked_for() -> None:
    model = llama()
    layer = quantized_layers(model, CONFIG)["model.layers.0.mlp.down_proj"]
    zeros = torch.zeros_like(layer.weight)

    def increase(calls, loss=None) -> float:
        return LossIncrease(model, calls, loss).with_weight(layer, zeros)

    of_tokens = increase(TOKEN_CALLS)
    assert of_tokens != 0
    labelled = {**BATCH, "labels": BATCH["input_ids"]}
    assert increase([((), labelled)]) == pytest.approx(of_tokens, rel=1e-5)
    assert increase([((BATCH["input_ids"],), {})]) == of_tokens
    assert increase(TOKEN_CALLS, lambda output, args, kwargs: torch.tensor(2.0)) == 0
    tower = Tower().eval()
    layer = quantized_layers(tower, CONFIG)["layers.2"]
    off = layer.weight @ tower.layers[1](tower.layers[0](X)).T
    expected = float(off.square().sum() / tower(X).square().sum())
    assert LossIncrease(tower, CALLS, None).with_weight(layer, 2 * layer.weight) == pytest.approx(
        expected, rel=1e-5
    )


def test_transposed_linears() -> None:
    """GPT-2's Conv1D keeps its weight the other way round."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    layers = quantized_layers(model, CONFIG)
    assert tuple(layers["transformer.h.0.attn.c_attn"].weight.shape) == (96, 32)
    budget = packed_bytes(model, 4, CONFIG)
    for metric in METRICS:
        plan = plan_bits(model, budget, metric=metric, calibration=[BATCH], config=CONFIG)
        assert set(plan) == set(layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either budget_bytes or budget_seconds"),
        ({"budget_bytes": 1, "budget_seconds": 1.0}, "either budget_bytes or budget_seconds"),
        ({"budget_bytes": 10, "metric": "zd"}, "budget must be at least"),
        ({"budget_bytes": 10**6, "metric": "vibes"}, "metric must be one of"),
        ({"budget_bytes": 10**6}, "needs calibration"),
        ({"budget_bytes": 10**6, "calibration": []}, "calibration is empty"),
        ({"budget_bytes": 10**6, "metric": "zd", "choices": ()}, "choices must not be empty"),
        ({"budget_bytes": 10**6, "metric": "zd", "choices": (5,)}, "bits must be one of"),
        ({"budget_seconds": 1.0, "metric": "zd", "times": {}}, "times has no"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_bits(Tower().eval(), **{"config": CONFIG, **arguments})


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        plan_bits(Tower(), 10**6, metric="zd")
    with pytest.raises(ValueError, match="no layer to quantize"):
        plan_bits(nn.LayerNorm(4).eval(), 10**6, metric="zd")
