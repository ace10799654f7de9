"""BitNet: against transformers' own packing and weight quantization; I2_S packed by definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from transformers.integrations.bitnet import BitLinear, WeightQuant, pack_weights

from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.loaders import bitnet_online_weight, bitnet_weight, i2s_weight
from effinfer.quant.loaders.bitnet import ternary_float_weight
from tests.quant.loaders.mutate import apply, mutations


def ternary(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (n, k), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_features", [64, 61])
def test_packed_by_transformers(out_features, dtype):
    values = ternary(out_features, 48)
    packed = pack_weights(values.clone())
    scale = torch.tensor([0.37], dtype=dtype)
    divided = bitnet_weight(packed, scale, out_features=out_features)
    assert divided.format == "ternary"
    assert torch.equal(divided.dequantize(), values.float() / scale.float())
    multiplied = bitnet_weight(
        packed, scale, out_features=out_features, linear_class="autobitlinear"
    )
    assert torch.equal(multiplied.dequantize(dtype), values.to(dtype) * scale)
    unpacked = ternary_float_weight(values.to(dtype), scale, "layer")
    assert torch.equal(unpacked.dequantize(dtype), values.to(dtype) * scale)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_transformers_does(bias):
    """Inputs in int8 too; in float32, where its own rounding is small."""
    theirs = BitLinear(96, 64, bias, dtype=torch.float32)
    theirs.weight.copy_(pack_weights(ternary(64, 96)))
    theirs.weight_scale.fill_(2.7)
    if bias:
        theirs.bias.normal_()
    weight = bitnet_weight(theirs.weight, theirs.weight_scale, out_features=64)
    ours = LowBitLinear.from_weight(weight, theirs.bias, activations="int8")
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        expected, found = theirs(x), ours(x)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_one_byte_by_hand():
    """0b10_01_00_11: outputs 0..3 have codes 3, 0, 1 and 2: values 2 (no encoder's), -1, 0, 1."""
    weight = bitnet_weight(
        torch.tensor([[0b10010011]], dtype=torch.uint8), torch.ones(1), out_features=4
    )
    assert weight.format == "int2"
    assert weight.dequantize()[:, 0].tolist() == [2, -1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_online_quantization_is_transformers(dtype):
    """Its function without ``torch.compile``, which would need a compiler at hand."""
    weight = torch.randn(32, 80, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain = WeightQuant.forward.__wrapped__(None, weight)
    assert torch.equal(bitnet_online_weight(weight).dequantize(dtype), plain)


def test_online_weight_of_zeros():
    assert not bitnet_online_weight(torch.zeros(4, 16)).dequantize().any()


def pack_i2s(values, scale, block):
    codes = (values.reshape(-1) + 1).tolist()
    quarter = block // 4
    data = bytearray(len(codes) // 4)
    for i, code in enumerate(codes):
        at, inside = divmod(i, block)
        data[at * quarter + inside % quarter] |= code << (6 - 2 * (inside // quarter))
    tail = np.float32(scale).tobytes() + bytes(28)
    return torch.tensor(list(data) + list(tail), dtype=torch.uint8)


@pytest.mark.parametrize("block", [128, 64])
def test_i2s(block):
    values = ternary(6, 256)
    weight = i2s_weight(pack_i2s(values, 0.013, block), (6, 256), block=block)
    assert weight.format == "ternary"
    assert torch.equal(weight.dequantize(), values.float() * torch.tensor(0.013))


def good():
    return {
        "weight": pack_weights(ternary(64, 48)),
        "weight_scale": torch.tensor([0.37]),
        "out_features": 64,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 68}, "layer.weight must have 17 rows for 68 outputs, got 16"),
        ({"weight": torch.zeros(64, 48)}, "layer.weight must be uint8"),
        ({"weight_scale": torch.ones(2)}, r"layer.weight_scale must have shape \(1,\)"),
        ({"weight_scale": torch.zeros(1)}, "layer.weight_scale must not be 0"),
        ({"weight_scale": torch.full((1,), torch.nan)}, "layer.weight_scale must be finite"),
        ({"weight_scale": torch.tensor([1e-45])}, "1 / layer.weight_scale must be finite"),
        ({"linear_class": "linear"}, "layer: linear_class must be"),
    ],
)
def test_errors_name_the_tensor(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bitnet_weight(**{**good(), **change}, name="layer")


def test_i2s_errors():
    data = pack_i2s(ternary(2, 128), 1.0, 128)
    with pytest.raises(ValueError, match=r"t must have shape \(96,\), got \(95,\)"):
        i2s_weight(data[:-1], (2, 128), name="t")
    with pytest.raises(ValueError, match="t must have a multiple of 128 weights"):
        i2s_weight(data, (2, 100), name="t")
    with pytest.raises(ValueError, match="t: block must be 64 or 128"):
        i2s_weight(data, (2, 128), block=32, name="t")


@settings(max_examples=40, deadline=None)
@given(mutations(("weight", "weight_scale"), ("out_features",)))
def test_damage_is_an_error_or_read_right(steps):
    arguments = apply(steps, good())
    try:
        weight = bitnet_weight(**arguments)
    except (ValueError, TypeError):
        return
    fields = [(arguments["weight"] >> 2 * i) & 3 for i in range(4)]
    values = torch.cat(fields)[: arguments["out_features"]].float() - 1
    assert torch.equal(weight.dequantize(), values / arguments["weight_scale"].float())
