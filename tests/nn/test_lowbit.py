"""LowBitLinear: a module like any other around the low-bit op."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from effinfer.nn import LowBitLinear
from effinfer.ops import lowbit_linear, pack_lowbit
from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight


def make_weight(format: str = "int4", n: int = 20, k: int = 96, **parts: bool) -> LowBitWeight:
    generator = torch.Generator().manual_seed(0)
    layout = FORMATS[format]
    group_size = k if format == "ternary_dense" else 32
    codes = torch.randint(layout.max_code + 1, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, k // group_size, generator=generator) + 0.1).half()
    return LowBitWeight(
        format,
        codes,
        scale,
        group_size,
        torch.ones(scale.shape, dtype=torch.uint8) if parts.get("zero") else None,
        scale / 8 if parts.get("offset") else None,
        torch.randperm(k, generator=generator) if parts.get("order") else None,
    )


def make_layer(**options: Any) -> LowBitLinear:
    return LowBitLinear.from_weight(make_weight(**options), torch.arange(20.0))


X = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
PARTS = [
    dict(zip(("zero", "offset", "order"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("format", FORMATS)
def test_forward_is_the_op(format: str, activations: str) -> None:
    weight, bias = make_weight(format), torch.arange(20.0)
    layer = LowBitLinear.from_weight(weight, bias, activations=activations)
    want = lowbit_linear(X, pack_lowbit(weight), bias, activations=activations)
    assert torch.equal(layer(X), want)
    assert torch.equal(layer.weight, weight.dequantize())
    assert torch.equal(layer.lowbit_weight().codes, weight.codes)


@pytest.mark.parametrize("parts", PARTS)
def test_a_state_loads_into_a_layer_of_its_description(parts: dict[str, bool]) -> None:
    layer = make_layer(**parts)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = LowBitLinear.from_description(layer.describe())
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(X), layer(X))
    assert again.describe() == layer.describe()


def test_a_fresh_layer_gives_its_bias() -> None:
    assert torch.equal(LowBitLinear(96, 20)(X), torch.zeros(3, 5, 20))
    assert LowBitLinear(96, 20, bias=False).bias is None


def test_loading_takes_over_at_once_with_assign() -> None:
    layer, other = make_layer(), make_layer(zero=False)
    layer(X)
    other.scale.mul_(2)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(X), other(X))
    assert layer.packed.data_ptr() == other.packed.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, "format is 'int3', the layer's is 'int4'"),
        ({"zero": True}, "zero is True, the layer's is False"),
        ({"k": 64}, "in_features is 64, the layer's is 96"),
    ],
)
def test_another_layers_state_is_refused(options: dict[str, Any], message: str) -> None:
    layer, state = make_layer(), make_layer(**options).state_dict()
    before = layer(X)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(X), before)


@pytest.mark.parametrize("bytes_", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b"12345"])
def test_a_damaged_description_is_refused(bytes_: bytes) -> None:
    layer = make_layer()
    state = layer.state_dict()
    state["description"] = torch.tensor(list(bytes_), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="description"):
        layer.load_state_dict(state)


def test_casts_leave_codes_and_scales() -> None:
    layer = LowBitLinear.from_weight(make_weight(), torch.arange(20.0))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        for name in ("packed", "scale", "description"):
            assert torch.equal(getattr(layer, name), before[name])
            assert getattr(layer, name).dtype == before[name].dtype
    assert torch.equal(layer.bias, before["bias"])
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert layer(X.bfloat16()).dtype == torch.bfloat16


def test_moves_take_everything_along() -> None:
    layer = make_layer(zero=True, order=True)
    layer.to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.packed_weight().packed.is_meta
    assert layer.packed_weight().order.is_meta


def test_copies_are_apart() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(X), layer(X))
    twin.scale.zero_()
    assert not torch.equal(twin(X), layer(X))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), layer(X))


@pytest.mark.parametrize("parts", [{}, {"order": True}])
def test_compiles_whole(parts: dict[str, bool]) -> None:
    model = nn.Sequential(make_layer(**parts), nn.GELU())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), model(X))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="LowBitLinear: format must be one of"):
        LowBitLinear(96, 20, format="int5")
    with pytest.raises(ValueError, match="group_size must be a multiple of 16"):
        LowBitLinear(96, 20, group_size=17)
    with pytest.raises(ValueError, match="activations must be one of"):
        LowBitLinear(96, 20, activations="int4")
    with pytest.raises(TypeError, match="scale_dtype"):
        LowBitLinear(96, 20, scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="bias must have shape"):
        LowBitLinear.from_weight(make_weight(), torch.zeros(3))
    good = make_layer().describe()
    for name, value in {"in_features": -1, "group_size": None, "scale_dtype": "int8"}.items():
        with pytest.raises(ValueError, match=name):
            LowBitLinear.from_description({**good, name: value})


def test_bad_inputs_are_the_ops_errors() -> None:
    layer = make_layer()
    for x in (torch.zeros(3, 95), torch.zeros(3, 96, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises((ValueError, TypeError), match="lowbit_linear"):
            layer(x)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        layer(torch.zeros(3, 96, requires_grad=True))
    assert layer(torch.zeros(0, 96)).shape == (0, 20)


def test_views_and_hooks_give_the_same_bits() -> None:
    layer = make_layer()
    wide = torch.zeros(3, 5, 200)
    wide[..., :96] = X
    assert torch.equal(layer(wide[..., :96]), layer(X))
    assert torch.equal(layer(X.transpose(0, 1)), layer(X).transpose(0, 1))
