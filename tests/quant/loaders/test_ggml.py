"""ggml's blocks against the ``gguf`` package's own dequantization."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.ops.lowbit_linear import pack_lowbit, unpack_lowbit
from effinfer.quant.loaders import GGML_TYPES, ggml_weight

# where float16 fields lie in a block: random bytes there would often be NaN or infinity
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def random_blocks(type, rows, blocks, seed=0):
    """Every byte random, every float16 field a finite number of either sign, subnormals too."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, type.block_bytes), dtype=np.uint8)
    for at in HALVES[type.name]:
        values = rng.standard_normal(rows * blocks) * 10.0 ** rng.integers(-7, 3, rows * blocks)
        data[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, blocks * type.block_bytes)


def reference(data, type):
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type.id))


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("type", GGML_TYPES.values(), ids=lambda t: t.name)
def test_sizes_are_ggmls(type):
    quantization = gguf.GGMLQuantizationType(type.id)
    assert quantization.name == type.name
    assert gguf.GGML_QUANT_SIZES[quantization] == (type.block, type.block_bytes)


@pytest.mark.parametrize("type", GGML_TYPES.values(), ids=lambda t: t.name)
def test_random_blocks_bit_for_bit(type):
    data = random_blocks(type, rows=5, blocks=64)
    weight = ggml_weight(torch.from_numpy(data), type)
    expected = reference(data, type)
    assert (weight.out_features, weight.in_features) == expected.shape
    assert np.array_equal(bits(weight.dequantize().numpy()), bits(expected))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_quantized_by_gguf(name):
    type = next(t for t in GGML_TYPES.values() if t.name == name)
    matrix = np.random.default_rng(1).standard_normal((7, 512)).astype(np.float32)
    data = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType(type.id))
    weight = ggml_weight(torch.from_numpy(data), type)
    assert np.array_equal(bits(weight.dequantize().numpy()), bits(reference(data, type)))
    if name.startswith("TQ"):
        assert weight.format == "ternary"


@pytest.mark.parametrize("type", GGML_TYPES.values(), ids=lambda t: t.name)
def test_packing_for_the_kernels_loses_nothing(type):
    weight = ggml_weight(torch.from_numpy(random_blocks(type, rows=21, blocks=2)), type)
    (back,) = unpack_lowbit(pack_lowbit(weight))
    for field in dataclasses.fields(weight):
        found, expected = getattr(back, field.name), getattr(weight, field.name)
        same = torch.equal(found, expected) if torch.is_tensor(expected) else found == expected
        assert same, field.name


def test_one_q4_k_block_by_hand():
    """d = 2, dmin = 0.5; all scales 3 and minimums 5; low nibbles 1, high nibbles 9."""
    type = GGML_TYPES[12]
    block = np.zeros(144, dtype=np.uint8)
    block[:4] = np.array([2.0, 0.5], dtype=np.float16).view(np.uint8)
    block[4:8], block[8:12], block[12:16] = 3, 5, 5 << 4 | 3
    block[16:] = 9 << 4 | 1
    weight = ggml_weight(torch.from_numpy(block)[None], type)
    expected = torch.tensor([6.0 - 2.5, 54.0 - 2.5]).repeat_interleave(32).repeat(4)
    assert torch.equal(weight.dequantize()[0], expected)


@pytest.mark.parametrize("type", GGML_TYPES.values(), ids=lambda t: t.name)
def test_a_scale_that_is_not_finite_is_an_error(type):
    data = random_blocks(type, rows=2, blocks=2)
    at = HALVES[type.name][0]
    data[1, at : at + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=r"layer\.weight: (scales|offsets) must be finite"):
        ggml_weight(torch.from_numpy(data), type, "layer.weight")


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match=r"w must be rows of whole Q8_0 blocks .34 bytes."):
        ggml_weight(torch.zeros(3, 35, dtype=torch.uint8), GGML_TYPES[8], "w")
    with pytest.raises(TypeError, match="w must be uint8"):
        ggml_weight(torch.zeros(3, 34, dtype=torch.int8), GGML_TYPES[8], "w")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(GGML_TYPES.values())),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=8),
)
def test_flipped_bytes_are_an_error_or_read_right(type, flips):
    data = random_blocks(type, rows=2, blocks=2).reshape(-1)
    for at, by in flips:
        data[at % data.size] ^= by
    data = data.reshape(2, -1)
    with np.errstate(all="ignore"):
        expected = reference(data, type)
    try:
        weight = ggml_weight(torch.from_numpy(data), type)
    except ValueError:
        assert not np.isfinite(expected).all()
        return
    assert np.array_equal(bits(weight.dequantize().numpy()), bits(expected))
