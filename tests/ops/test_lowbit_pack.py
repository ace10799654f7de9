"""Packing loses nothing, and says what it cannot take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from effinfer.ops import LowBitWeight, pack_lowbit, unpack_lowbit
from effinfer.ops.lowbit_weight import FORMATS
from tests.ops.test_lowbit_linear import SHAPES, group_sizes, random_weight


@pytest.mark.parametrize(
    ("shape", "gate"),
    [*((shape, gate) for shape in [*SHAPES, (4, 0)] for gate in (False, True)), ((0, 4), False)],
)
@pytest.mark.parametrize("format", FORMATS)
def test_unpack_inverts_pack(format, shape, gate):
    for group in group_sizes(format, shape[1]):
        kind = {"zero": True, "offset": True, "dtype": torch.bfloat16}
        want = [random_weight(format, *shape, group, **kind) for _ in range(1 + gate)]
        packed = pack_lowbit(want[-1], gate_weight=want[0] if gate else None)
        layout = FORMATS[format]
        panels, units = -(-shape[0] // 16) * (1 + gate), -(-shape[1] // layout.unit)
        assert packed.packed.shape == (panels, units, layout.unit_bytes)
        got = unpack_lowbit(packed)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scale, other.scale)
            assert torch.equal(one.offset, other.offset)
            assert (one.zero is None) == (other.zero is None)
            assert one.zero is None or torch.equal(one.zero, other.zero)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_past_the_end_are_zero(format):
    layout = FORMATS[format]
    weight = random_weight(format, 20, 100)
    blank = layout.centre if format in ("int8", "ternary_dense") else 0
    grid = torch.full((32, -(-100 // layout.unit) * layout.unit), blank, dtype=torch.uint8)
    grid[:20, :100] = weight.codes
    padded = LowBitWeight(format, grid, torch.ones(32, 1), 4096)
    assert torch.equal(pack_lowbit(weight).packed, pack_lowbit(padded).packed)
    nothing = torch.full_like(grid, blank)
    assert not pack_lowbit(replace(padded, codes=nothing)).packed.any()


def test_prefix_errors():
    packed = pack_lowbit(random_weight("int4", 40, 128, 32))
    with pytest.raises(ValueError, match=r"prefix: out_features must be 40 or .* got 17"):
        packed.prefix(17)
    with pytest.raises(ValueError, match=r"prefix: in_features must be 128 or .* got 24"):
        packed.prefix(None, 24)
