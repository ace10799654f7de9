"""GPTQ: codes packed here from the format's definition, one Python integer per column."""

import pytest
import torch
from hypothesis import given, settings

from effinfer.quant.loaders import gptq_weight
from tests.quant.loaders.mutate import apply, mutations

BITS = (2, 3, 4, 8)


def pack_down(codes, bits):
    """(count, C) codes to int32 words: each column one little-endian bit stream."""
    columns = []
    for column in codes.t().tolist():
        stream = sum(code << bits * i for i, code in enumerate(column))
        words = [(stream >> 32 * i) & 0xFFFFFFFF for i in range(len(column) * bits // 32)]
        columns.append([w - (1 << 32) if w >= 1 << 31 else w for w in words])
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def unpack_down(words, bits):
    columns = []
    for column in words.t().tolist():
        stream = sum((w & 0xFFFFFFFF) << 32 * i for i, w in enumerate(column))
        columns.append(
            [(stream >> bits * i) & ((1 << bits) - 1) for i in range(len(column) * 32 // bits)]
        )
    return torch.tensor(columns).t()


def make(bits, k=192, n=64, group_size=64, dtype=torch.float16, seed=0):
    """A layer's codes, zeros and scales as numbers."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-k // group_size)
    codes = torch.randint(0, 1 << bits, (k, n), generator=generator)
    zeros = torch.randint(0, 1 << bits, (count, n), generator=generator)
    scales = (torch.randn(count, n, generator=generator) * 0.01).to(dtype)
    return codes, zeros, scales


def expected(codes, zeros, scales, g_idx):
    """The definition, as the references compute it: the product in the scales' dtype."""
    difference = codes - zeros[g_idx]
    return (scales[g_idx] * difference.to(scales.dtype)).t()


def pack_zeros(zeros, bits, minus_one):
    stored = (zeros - 1) % (1 << bits) if minus_one else zeros
    return pack_down(stored.t(), bits).t().contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_bit_for_bit(bits, checkpoint_format, dtype):
    codes, zeros, scales = make(bits, dtype=dtype)
    zeros[0, 0] = 0  # which version 1 stores as the highest code
    weight = gptq_weight(
        pack_down(codes, bits),
        pack_zeros(zeros, bits, checkpoint_format == "gptq"),
        scales,
        bits=bits,
        group_size=64,
        checkpoint_format=checkpoint_format,
    )
    g_idx = torch.arange(192) // 64
    assert weight.format == f"int{bits}"
    assert torch.equal(weight.dequantize(dtype), expected(codes, zeros, scales, g_idx))
    # nothing rounds in float32: 11 significant bits times 8
    wide = expected(codes, zeros, scales.double(), g_idx)
    assert dtype is torch.float32 or torch.equal(weight.dequantize().double(), wide)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_act_order(bits, group_size):
    """128 leaves the last group short."""
    codes, zeros, scales = make(bits, group_size=group_size)
    generator = torch.Generator().manual_seed(1)
    g_idx = (torch.arange(192) // group_size)[torch.randperm(192, generator=generator)]
    weight = gptq_weight(
        pack_down(codes, bits),
        pack_zeros(zeros, bits, True),
        scales,
        g_idx.int(),
        bits=bits,
        group_size=group_size,
    )
    assert weight.order is not None
    assert torch.equal(weight.dequantize(torch.float16), expected(codes, zeros, scales, g_idx))


def test_ordered_g_idx_needs_no_gather():
    codes, zeros, scales = make(4)
    g_idx = torch.arange(192, dtype=torch.int32) // 64
    weight = gptq_weight(
        pack_down(codes, 4), pack_zeros(zeros, 4, True), scales, g_idx, bits=4, group_size=64
    )
    assert weight.order is None


def test_three_bits_straddle_words_by_hand():
    """32 codes 0..7,0..7,...: words 0 and 1 share code 10 (2), 1 and 2 share code 21 (5)."""
    codes = (torch.arange(32) % 8)[:, None].expand(32, 32).contiguous()
    words = pack_down(codes, 3)[:, 0].tolist()
    low = sum((i % 8) << 3 * i for i in range(10)) | (2 & 3) << 30
    assert words[0] & 0xFFFFFFFF == low
    assert words[1] & 1 == 2 >> 2
    assert words[2] & 3 == 5 >> 1
    weight = gptq_weight(
        torch.tensor(words, dtype=torch.int32)[:, None].expand(3, 32).contiguous(),
        torch.zeros(1, 3, dtype=torch.int32),
        torch.ones(1, 32),
        bits=3,
        group_size=-1,
        checkpoint_format="gptq_v2",
    )
    assert torch.equal(weight.dequantize(), codes.t().float())


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_files_tell_their_version(bits):
    codes, zeros, scales = make(bits)
    zeros.fill_(1 << (bits - 1))
    for minus_one in (True, False):
        for claim in ("gptq", "gptq_v2"):
            weight = gptq_weight(
                pack_down(codes, bits),
                pack_zeros(zeros, bits, minus_one),
                scales,
                bits=bits,
                group_size=64,
                checkpoint_format=claim,
                sym=True,
            )
            assert weight.zero is None  # the format's own centre
            plain = expected(codes, zeros, scales, torch.arange(192) // 64)
            assert torch.equal(weight.dequantize(torch.float16), plain)


def test_asymmetric_zeros_follow_the_claim():
    codes, zeros, scales = make(4)
    zeros.fill_(8)
    packed = pack_down(codes, 4), pack_zeros(zeros, 4, False), scales
    weight = gptq_weight(*packed, bits=4, group_size=64)
    assert weight.zero is not None
    assert int(weight.zero.unique()) == 9


def test_one_group_for_all():
    codes, zeros, scales = make(4, group_size=192)
    weight = gptq_weight(
        pack_down(codes, 4), pack_zeros(zeros, 4, True), scales, bits=4, group_size=-1
    )
    plain = expected(codes, zeros, scales, torch.zeros(192, dtype=torch.int64))
    assert torch.equal(weight.dequantize(torch.float16), plain)


def test_three_bits_in_groups_of_16_become_four():
    codes, zeros, scales = make(3, group_size=16)
    weight = gptq_weight(
        pack_down(codes, 3), pack_zeros(zeros, 3, True), scales, bits=3, group_size=16
    )
    assert weight.format == "int4"
    plain = expected(codes, zeros, scales, torch.arange(192) // 16)
    assert torch.equal(weight.dequantize(torch.float16), plain)


def good(bits=4):
    codes, zeros, scales = make(bits)
    return {
        "qweight": pack_down(codes, bits),
        "qzeros": pack_zeros(zeros, bits, True),
        "scales": scales,
        "g_idx": torch.arange(192, dtype=torch.int32) // 64,
        "bits": bits,
        "group_size": 64,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "layer: bits must be one of"),
        ({"group_size": 0}, "layer: group_size must be"),
        ({"group_size": 32}, r"layer.scales must have shape \(6, 64\), got \(3, 64\)"),
        ({"group_size": 2**40}, r"layer.scales must have shape \(1, 64\)"),
        ({"scales": torch.ones(3, 32)}, r"layer.scales must have shape \(3, 64\)"),
        ({"scales": torch.full((3, 64), torch.nan)}, "layer.scales must be finite"),
        ({"scales": torch.ones(3, 64, dtype=torch.int32)}, "layer.scales must be float16"),
        ({"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "layer.qzeros must have shape"),
        ({"qweight": torch.zeros(0, 64, dtype=torch.int32)}, "layer.qweight must be a matrix"),
        ({"g_idx": torch.full((192,), 3)}, r"layer.g_idx must lie in 0..2, got 3..3"),
        ({"g_idx": -torch.ones(192, dtype=torch.int32)}, "layer.g_idx must lie in"),
        ({"g_idx": torch.zeros(192, dtype=torch.int32)}, "layer.g_idx must give every group 64"),
        ({"g_idx": torch.zeros(191, dtype=torch.int32)}, "layer.g_idx must have shape"),
        ({"checkpoint_format": "gptq_p"}, "layer: checkpoint_format must be"),
    ],
)
def test_errors_name_the_tensor(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gptq_weight(**{**good(), **change}, name="layer")


@settings(max_examples=40, deadline=None)
@given(mutations(("qweight", "qzeros", "scales", "g_idx"), ("bits", "group_size")))
def test_damage_is_an_error_or_read_right(steps):
    arguments = apply(steps, good())
    try:
        weight = gptq_weight(**arguments)
    except (ValueError, TypeError):
        return
    bits = arguments["bits"]
    zeros = (unpack_down(arguments["qzeros"].t(), bits).t() + 1) % (1 << bits)
    codes = unpack_down(arguments["qweight"], bits)
    plain = expected(codes, zeros, arguments["scales"], arguments["g_idx"].long())
    assert torch.equal(weight.dequantize(arguments["scales"].dtype), plain)
