"""HQQ: packed here from the definition of its formats; its formula evaluated in float32."""

import pytest
import torch
from hypothesis import given, settings

from effinfer.quant.loaders import hqq_dense, hqq_weight
from effinfer.quant.loaders.hqq import hqq_meta
from tests.quant.loaders.mutate import apply, mutations

# bits of a code in its element, codes an element, dtype
PACKING = {
    8: (8, 1, torch.uint8),
    6: (8, 1, torch.uint8),
    5: (8, 1, torch.uint8),
    4: (4, 2, torch.uint8),
    3: (3, 10, torch.int32),
    2: (2, 4, torch.uint8),
    1.58: (2, 4, torch.uint8),
    1: (1, 8, torch.uint8),
}


def pack(codes, nbits):
    """Element e holds rows e, e + step, e + 2 step...: the first in the highest bits used."""
    bits, per_element, dtype = PACKING[nbits]
    step = -(-codes.shape[0] // per_element)
    padded = torch.zeros(step * per_element, codes.shape[1], dtype=torch.int64)
    padded[: codes.shape[0]] = codes
    words = sum(
        padded[i * step : (i + 1) * step] << bits * (per_element - 1 - i)
        for i in range(per_element)
    )
    return words.to(dtype)


def make(nbits, n=24, k=128, group_size=64, dtype=torch.float16, axis=1, integer=False):
    generator = torch.Generator().manual_seed(0)
    groups = n * k // group_size
    top = round(2**nbits - 1)
    shape = (groups, group_size) if axis else (group_size, groups)
    codes = torch.randint(0, top + 1, shape, generator=generator)
    zero = torch.rand(groups, 1, generator=generator) * top * 1.5 - top * 0.1
    zero = zero.round().clamp(0, top) if integer else zero
    scale = torch.rand(groups, 1, generator=generator) * 0.1
    if not axis:
        zero, scale = zero.t(), scale.t()
    arguments = {
        "w_q": pack(codes, nbits),
        "scale": scale.to(dtype),
        "zero": zero.to(dtype),
        "nbits": nbits,
        "shape": (n, k),
        "group_size": group_size,
    }
    return codes, arguments


def expected(codes, arguments, dtype=torch.float32):
    zero, scale = arguments["zero"].to(dtype), arguments["scale"].to(dtype)
    return ((codes.to(dtype) - zero) * scale).reshape(arguments["shape"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", PACKING)
def test_float_zeros_bit_for_bit(nbits, dtype):
    codes, arguments = make(nbits, dtype=dtype)
    weight = hqq_weight(**arguments)
    assert torch.equal(weight.dequantize(), expected(codes, arguments))
    assert weight.offset is not None


@pytest.mark.parametrize("nbits", PACKING)
def test_float32_zeros(nbits):
    """The offset rounds once more: half an ulp of scale * zero, and one of the result."""
    codes, arguments = make(nbits, dtype=torch.float32)
    weight = hqq_weight(**arguments)
    exact = expected(codes, arguments, torch.float64)
    largest = (arguments["zero"] * arguments["scale"]).abs().max() + exact.abs().max()
    assert (weight.dequantize().double() - exact).abs().max() <= 2.0**-23 * largest


@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2])
def test_zeros_that_are_codes_agree_in_float16_too(nbits):
    codes, arguments = make(nbits, integer=True)
    weight = hqq_weight(**arguments)
    assert weight.offset is None
    plain = expected(codes, arguments, torch.float16)
    assert torch.equal(weight.dequantize(torch.float16), plain)


def test_formats():
    assert hqq_weight(**make(8)[1]).format == "int8"
    assert hqq_weight(**make(5)[1]).format == "int8"
    assert hqq_weight(**make(4)[1]).format == "int4"
    assert hqq_weight(**make(3)[1]).format == "int3"
    assert hqq_weight(**make(3, group_size=16)[1]).format == "int4"
    assert hqq_weight(**make(2)[1]).format == "int2"


def test_one_bit_is_binary_where_that_is_exact():
    codes, arguments = make(1)
    arguments["zero"].fill_(0.5)
    weight = hqq_weight(**arguments)
    assert weight.format == "binary"
    assert torch.equal(weight.dequantize(), expected(codes, arguments))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_axis_0(dtype):
    """Also with the bytes viewed as floats."""
    codes, arguments = make(4, axis=0, group_size=8)
    plain = expected(codes, arguments)
    arguments["w_q"] = arguments["w_q"].view(dtype)
    assert torch.equal(hqq_dense(**arguments), plain)


def test_bytes_viewed_as_floats():
    for nbits in (4, 3):
        codes, arguments = make(nbits)
        arguments["w_q"] = arguments["w_q"].view(torch.float16)
        assert torch.equal(hqq_weight(**arguments).dequantize(), expected(codes, arguments))


def test_meta_as_a_state_dict_encodes_it():
    tensors = {
        "nbits": torch.tensor(1.58),
        "group_size": torch.tensor(64, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "shape": torch.tensor([24, 128]),
        "compute_dtype": torch.tensor([ord(c) for c in "__import__('os')"], dtype=torch.uint8),
    }
    assert hqq_meta(tensors) == {
        "nbits": 1.58,
        "group_size": 64,
        "axis": 1,
        "view_as_float": 0,
        "shape": (24, 128),
    }
    with pytest.raises(ValueError, match=r"layer\.shape must be two integers"):
        hqq_meta({"shape": torch.tensor([1, 2, 3])}, "layer")
    with pytest.raises(ValueError, match=r"layer\.nbits must have one real element"):
        hqq_meta({"nbits": torch.tensor([4, 4])}, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbits": 7}, "layer: nbits must be one of"),
        ({"group_size": 0}, "layer: group_size must divide"),
        ({"group_size": 48, "scale": torch.ones(64, 1)}, r"layer.W_q must have shape \(32, 48\)"),
        ({"shape": (2**40, 2**40)}, "layer.W_q must have shape"),
        ({"shape": (48, 64), "group_size": 128}, r"layer.W_q must have shape"),
        ({"scale": torch.ones(48)}, "layer.scale must be a matrix"),
        ({"zero": torch.full((48, 1), torch.nan)}, "layer.zero must be finite"),
        ({"w_q": torch.zeros(24, 64)}, r"layer.W_q must have shape \(24, 64\), got \(24, 256\)"),
    ],
)
def test_errors_name_the_tensor(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        hqq_weight(**{**make(4)[1], **change}, name="layer")


def test_groups_across_outputs_are_an_error():
    _, arguments = make(8, n=24, k=32, group_size=64)
    with pytest.raises(ValueError, match="group_size must divide 32 inputs, got 64"):
        hqq_weight(**arguments)


def test_codes_beyond_the_bits():
    _, arguments = make(5)
    arguments["w_q"][0, 0] = 32
    with pytest.raises(ValueError, match="codes must be at most 31, got 32"):
        hqq_weight(**arguments)


@settings(max_examples=40, deadline=None)
@given(mutations(("w_q", "scale", "zero"), ("nbits", "group_size")))
def test_damage_is_an_error_or_read_right(steps):
    arguments = apply(steps, make(4)[1])
    try:
        weight = hqq_weight(**arguments)
    except (ValueError, TypeError):
        return
    bits, per_element, _ = PACKING[arguments["nbits"]]
    packed = arguments["w_q"].view(torch.uint8).long()
    fields = [
        packed >> bits * (per_element - 1 - i) & ((1 << bits) - 1) for i in range(per_element)
    ]
    plain = expected(torch.cat(fields), arguments, torch.float64)
    error = (weight.dequantize().double() - plain).abs()
    assert (error <= 2.0**-22 * (plain.abs() + 1e-30 + _largest(arguments))).all()


def _largest(arguments):
    return (arguments["zero"].double() * arguments["scale"].double()).abs().max()
