"""torch's int4pack: the operator itself, given an identity, tells what its weight is."""

import pytest
import torch
from hypothesis import given, settings

from effinfer.quant.loaders import int4pack_weight
from tests.quant.loaders.mutate import apply, mutations


def make(n=96, k=128, group_size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
    parts = torch.randn(k // group_size, n, 2, generator=generator).to(dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return codes, {"packed": packed, "scales_and_zeros": parts, "group_size": group_size}


def torch_weight(packed, scales_and_zeros, group_size):
    """y = I W^T, in the scales' dtype."""
    eye = torch.eye(packed.shape[1] * 2, dtype=scales_and_zeros.dtype)
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return op(eye, packed, group_size, scales_and_zeros).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [16, 32, 48, 64, 80, 112, 128])
def test_as_torch_multiplies(n, dtype):
    """Also the short last block: 16 outputs of 48, 80, 112 under AVX2."""
    codes, arguments = make(n=n, dtype=dtype)
    weight = int4pack_weight(**arguments)
    assert torch.equal(weight.codes, codes.to(torch.uint8))
    # one rounding of the exact value: float32 scales need float64 on the way
    once = (
        weight.dequantize(torch.float64).float()
        if dtype is torch.float32
        else weight.dequantize(dtype)
    )
    assert torch.equal(once, torch_weight(**arguments))


LAYOUTS = {"avx512": (64, True), "avx2": (32, True), "plain": (32, False), "neon": (16, False)}


def places(n, k, layout):
    """(byte, low half) of every code, by definition: ``[output][input]``."""
    block, halves = LAYOUTS[layout]
    found = [[None] * k for _ in range(n)]
    byte = 0
    for first in range(0, n, block):
        size = min(block, n - first)
        for column in range(k):
            for j in range(size // 2):
                pair = (j, j + size // 2) if halves and size == block else (2 * j, 2 * j + 1)
                found[first + pair[0]][column] = (byte, True)
                found[first + pair[1]][column] = (byte, False)
                byte += 1
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_by_definition(layout):
    """Packed byte by byte: 112 outputs leave a short block in each but neon's."""
    n, k = 112, 16
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(1))
    data = torch.zeros(n * k // 2, dtype=torch.uint8)
    for row, columns in enumerate(places(n, k, layout)):
        for column, (byte, low) in enumerate(columns):
            data[byte] |= int(codes[row, column]) << (0 if low else 4)
    packed = data.reshape(n, k // 2)
    weight = int4pack_weight(packed, torch.ones(1, n, 2), group_size=k, layout=layout)
    assert torch.equal(weight.codes, codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "w: group_size must be at least 1"),
        ({"group_size": 64}, r"w's scales_and_zeros must have shape \(2, 96, 2\)"),
        (
            {"packed": torch.zeros(20, 64, dtype=torch.uint8)},
            "w must have a multiple of 16 outputs",
        ),
        ({"packed": torch.zeros(96, 64)}, "w must be uint8"),
        (
            {"scales_and_zeros": torch.full((4, 96, 2), torch.nan)},
            "w's scales_and_zeros must be finite",
        ),
        ({"layout": "sse"}, "w: layout must be one of"),
    ],
)
def test_errors_name_the_tensor(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        int4pack_weight(**{**make()[1], **change}, name="w")


@settings(max_examples=40, deadline=None)
@given(mutations(("packed", "scales_and_zeros"), ("group_size",)))
def test_damage_is_an_error_or_read_right(steps):
    arguments = apply(steps, {**make()[1], "layout": "avx2"})
    try:
        weight = int4pack_weight(**arguments)
    except (ValueError, TypeError):
        return
    data = arguments["packed"].reshape(-1).tolist()
    n, k = arguments["packed"].shape[0], arguments["packed"].shape[1] * 2
    found = places(n, k, "avx2")
    codes = [[data[b] & 15 if low else data[b] >> 4 for b, low in row] for row in found]
    scale, zero = (
        part.float().repeat_interleave(min(arguments["group_size"], k), dim=1)[:, :k]
        for part in arguments["scales_and_zeros"].permute(2, 1, 0)
    )
    assert torch.equal(weight.dequantize(), (torch.tensor(codes) - 8) * scale + zero)
