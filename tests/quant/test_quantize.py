"""quantize_: what it replaces, what it leaves and says so, and that a failure changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from effinfer import PatchConflictError, QuantConfig, UnsupportedModelError, quantize_
from effinfer.models import demo_path
from effinfer.nn import LowBitLinear
from effinfer.quant import quantize_linear, rtn
from effinfer.quant.calibrate import collect, in_groups

from .models import Tower, tiny_lm, tokens

CONFIG = QuantConfig(bits=4, group_size=32)
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def quantize(model: nn.Module, config: QuantConfig = CONFIG, *data: Any, **options: Any) -> Any:
    return quantize_(model, config, *data, progress=False, **options)


def float_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_before(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.2), (3, 0.4), (2, 0.8)])
def test_outputs_are_near_by_bits(bits: int, bound: float, activations: str) -> None:
    model = Tower().eval()
    want = model(X)
    report = quantize(model, QuantConfig(bits=bits, group_size=32, activations=activations))
    assert ((model(X) - want).norm() / want.norm()).item() < bound
    assert [layer.name for layer in report.layers] == ["first", "shared", "inner.0", "last"]
    assert not any(m.training for m in model.modules())
    assert report.bytes_after == sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("bits", [1, 1.58, "ternary_dense", "binary", "int3"])
def test_every_format_runs(bits: Any) -> None:
    model = Tower().eval()
    quantize(model, QuantConfig(bits=bits, group_size=32))
    assert model(X).isfinite().all()


def test_a_layer_with_two_parents_stays_one() -> None:
    model = Tower().eval()
    quantize(model)
    assert isinstance(model.shared, LowBitLinear)
    assert model.inner.again is model.shared
    assert torch.equal(
        model.shared.lowbit_weight().codes, rtn(Tower().shared.weight, group_size=32).codes
    )


def test_calibration_lowers_the_error_and_is_reported() -> None:
    data = [torch.randn(64, 8) @ torch.randn(8, 64) for _ in range(3)]
    errors = []
    for method in ("rtn", "gptq", "gptq+cd"):
        report = quantize(Tower().eval(), QuantConfig(bits=3, group_size=32, method=method), data)
        first = report.layers[0]
        assert (first.method, first.measured) == (method, "output")
        errors.append(first.error)
    assert errors[0] > errors[1] > errors[2]
    assert "output error" in str(report)
    assert report.to_dict()["layers"][0]["name"] == "first"


def test_batches_of_every_kind() -> None:
    config = QuantConfig(bits=4, group_size=32, method="gptq")
    states = []
    for data in (X, [X], [(X,)], [{"x": X}], [X[:2], X[2:]]):
        model = Tower().eval()
        quantize(model, config, data)
        states.append(model.state_dict())
    for state in states[1:-1]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_texts_by_the_models_own_tokenizer() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_path(), local_files_only=True).eval()
    keep = QuantConfig(exclude=["*layers.[1-9]*"], method="gptq", group_size=32)
    report = quantize(model, keep, "The json module reads text. " * 3)
    methods = {layer.name.rpartition(".")[2]: layer.method for layer in report.layers}
    # transformers' mixer multiplies by dt_proj.weight itself, without calling the module.
    assert methods.pop("dt_proj") == "rtn, no input reached it"
    assert methods == {"in_proj": "gptq", "x_proj": "gptq", "out_proj": "gptq"}
    with pytest.raises(ValueError, match="need a tokenizer"):
        quantize(tiny_lm("llama"), keep, ["text"])


def test_inputs_are_counted_once_each() -> None:
    model = Tower().eval()
    layers = {"first": model.first, "shared": model.shared}
    found = collect(model, layers, [((X,), {}), ((X[:2],), {})])
    assert torch.allclose(found["first"].hessian, X.t() @ X + X[:2].t() @ X[:2], atol=1e-4)
    assert found["first"].rows == 8
    assert found["shared"].rows == 16  # called twice
    assert in_groups({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]


def test_a_layer_no_input_reaches_is_rounded_and_reported() -> None:
    model = Tower().eval()
    model.add_module("unused", nn.Linear(64, 32))
    report = quantize(model, QuantConfig(bits=4, group_size=32, method="gptq"), X)
    assert report.layers[-1].method == "rtn, no input reached it"
    assert report.layers[-1].measured == "weight"
    assert "no input reached it" in str(report)


def test_plan_and_exclude() -> None:
    model = Tower().eval()
    plan = {"first": 8, "last": None}
    report = quantize(model, QuantConfig(bits=3, group_size=32, plan=plan, exclude=["inner.0"]))
    assert {layer.name: layer.format for layer in report.layers} == {
        "first": "int8",
        "shared": "int3",
    }
    assert {s.name: s.reason for s in report.skipped} == {
        "inner.0": "in exclude",
        "last": "the plan leaves it in float",
    }
    with pytest.raises(ValueError, match=r"plan names layers that are no linear layers .*nowhere"):
        quantize(Tower().eval(), QuantConfig(plan={"nowhere": 4}))


def test_heads_and_tied_weights_stay_in_float() -> None:
    tied = tiny_lm("llama", tie_word_embeddings=True)
    reasons = {s.name: s.reason for s in quantize(tied, QuantConfig(quantize_head=True)).skipped}
    assert "tied to model.embed_tokens" in reasons["lm_head"]
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    free = tiny_lm("llama", tie_word_embeddings=False)
    assert "the output head" in str(quantize(copy.deepcopy(free)))
    for config in (QuantConfig(quantize_head=True), QuantConfig(plan={"lm_head": 8})):
        model = copy.deepcopy(free)
        quantize(model, config)
        assert isinstance(model.lm_head, LowBitLinear)
        assert model(tokens()).logits.isfinite().all()


def test_conv1d_of_transformers() -> None:
    model = tiny_lm("gpt2")
    want = model(tokens()).logits
    report = quantize(model, QuantConfig(bits=8, group_size=32))
    assert len(report.layers) == 8
    assert ((model(tokens()).logits - want).norm() / want.norm()).item() < 0.05


def test_hooks_move_over_and_can_still_be_removed() -> None:
    model, calls = Tower().eval(), []
    handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    quantize(model)
    model(X)
    assert calls == [1]
    handle.remove()
    model(X)
    assert calls == [1]


class Loud(nn.Linear):
    """Somebody's own linear."""


def test_what_is_no_plain_linear_is_left_and_reported() -> None:
    model = nn.ModuleDict(
        {
            "own": Loud(64, 64),
            "wide": nn.Linear(64, 64, dtype=torch.float64),
            "replaced": nn.Linear(64, 64),
            "attention": nn.MultiheadAttention(64, 4),
        }
    ).eval()
    model["replaced"].forward = lambda x: x
    report = quantize(model)
    assert report.layers == []
    assert {s.name: s.reason.split(";")[0] for s in report.skipped} == {
        "own": "a subclass of nn.Linear, whose forward may be another",
        "wide": "its weight is torch.float64",
        "replaced": "its forward was replaced on the instance",
        "attention.out_proj": "a subclass of nn.Linear, whose forward may be another",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype: torch.dtype) -> None:
    model = Tower().to(dtype).eval()
    want = model(X.to(dtype))
    quantize(model, QuantConfig(bits=8, group_size=32))
    got = model(X.to(dtype))
    assert got.dtype == dtype
    assert ((got - want).norm() / want.norm()).item() < 0.05


def poison(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.last.weight[0, 0] = value


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_name_the_layer_and_leave_the_model(method: str, value: float) -> None:
    model = Tower().eval()
    poison(model, value)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"layer last: .* weight must be finite"):
        quantize(model, QuantConfig(group_size=32, method=method), X)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, LowBitLinear) for m in model.modules())


class Interrupted(Exception):
    """Raised in the middle."""


def test_a_failure_in_calibration_leaves_the_model() -> None:
    model = Tower().eval()
    state = float_state(model)

    def stop(*_: Any) -> None:
        raise Interrupted

    handle = model.last.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        quantize(model, QuantConfig(group_size=32, method="gptq"), X)
    handle.remove()
    assert_as_before(model, state)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (QuantConfig(group_size=17), None, "layer first: .*group_size must be a multiple of 16"),
        (QuantConfig(bits=3, group_size=16), None, "group_size must be a multiple of 32"),
        (QuantConfig(method="gptq"), None, "needs calibration"),
        (QuantConfig(method="gptq"), [], "calibration is empty"),
        (QuantConfig(method="gptq"), [torch.zeros(0, 64)], "calibration is empty"),
        (QuantConfig(method="gptq"), torch.full((2, 64), torch.nan), "layer first NaN or infinity"),
    ],
)
def test_bad_arguments_leave_the_model(config: QuantConfig, data: Any, message: str) -> None:
    model = Tower().eval()
    state = float_state(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, config, data)
    assert_as_before(model, state)


def test_bad_calibration_types() -> None:
    for data in (3, [3]):
        with pytest.raises(TypeError, match="calibration must hold texts"):
            quantize(Tower().eval(), QuantConfig(method="gptq"), data)


def test_models_that_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="training mode"):
        quantize(Tower())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        quantize(Tower().eval().to("meta"))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        quantize(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize_linear"):
        quantize(nn.Linear(64, 64).eval())
    twice = Tower().eval()
    quantize(twice)
    with pytest.raises(PatchConflictError, match="low-bit layers already"):
        quantize(twice)


def test_one_linear_by_itself() -> None:
    layer = nn.Linear(64, 20)
    made = quantize_linear(layer, QuantConfig(bits=8))
    assert torch.allclose(made(X), layer(X), atol=0.05)
    assert isinstance(layer, nn.Linear)
