"""AWQ: packed here nibble by nibble from the format's definition."""

import pytest
import torch
from hypothesis import given, settings

from effinfer.quant.loaders import awq_weight
from tests.quant.loaders.mutate import apply, mutations

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(codes):
    """(rows, N) codes to (rows, N / 8) words: nibble i of a word is output ORDER[i]."""
    rows = []
    for row in codes.tolist():
        words = []
        for at in range(0, len(row), 8):
            word = sum(row[at + ORDER[i]] << 4 * i for i in range(8))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def unpack(words):
    rows = []
    for row in words.tolist():
        codes = [0] * (8 * len(row))
        for at, word in enumerate(row):
            for i in range(8):
                codes[8 * at + ORDER[i]] = (word >> 4 * i) & 15
        rows.append(codes)
    return torch.tensor(rows)


def expected(codes, zeros, scales, group_size):
    rows = torch.arange(codes.shape[0]) // group_size
    return ((codes - zeros[rows]).to(scales.dtype) * scales[rows]).t()


def make(k=128, n=48, group_size=64, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.randint(0, 16, (k // group_size, n), generator=generator)
    return codes, zeros, (torch.randn(k // group_size, n, generator=generator) / 64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bit_for_bit(group_size, dtype):
    codes, zeros, scales = make(group_size=group_size, dtype=dtype)
    weight = awq_weight(pack(codes), pack(zeros), scales, group_size=group_size)
    assert weight.format == "int4"
    assert torch.equal(weight.dequantize(dtype), expected(codes, zeros, scales, group_size))


def test_one_word_by_hand():
    """Nibbles 0..7 from the lowest: outputs 0, 2, 4, 6, 1, 3, 5, 7 get them."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32).expand(16, 1).contiguous()
    zero = torch.zeros(1, 1, dtype=torch.int32)
    weight = awq_weight(word, zero, torch.ones(1, 8), group_size=-1)
    assert weight.dequantize()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def good():
    codes, zeros, scales = make()
    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales, "group_size": 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "layer: group_size must be"),
        ({"group_size": 32}, r"layer.qzeros must have shape \(4, 6\)"),
        ({"scales": torch.ones(2, 6)}, r"layer.scales must have shape \(2, 48\)"),
        ({"scales": torch.full((2, 48), torch.inf)}, "layer.scales must be finite"),
        ({"qweight": torch.zeros(128, 6)}, "layer.qweight must be int32"),
        ({"qweight": torch.zeros(6, dtype=torch.int32)}, "layer.qweight must be a matrix"),
    ],
)
def test_errors_name_the_tensor(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        awq_weight(**{**good(), **change}, name="layer")


@settings(max_examples=40, deadline=None)
@given(mutations(("qweight", "qzeros", "scales"), ("group_size",)))
def test_damage_is_an_error_or_read_right(steps):
    arguments = apply(steps, good())
    try:
        weight = awq_weight(**arguments)
    except (ValueError, TypeError):
        return
    codes, zeros = unpack(arguments["qweight"]), unpack(arguments["qzeros"])
    group_size = codes.shape[0] if arguments["group_size"] == -1 else arguments["group_size"]
    plain = expected(codes, zeros, arguments["scales"], group_size)
    assert torch.equal(weight.dequantize(arguments["scales"].dtype), plain)
