"""RTN against straightforward float64 code, and its scales against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight
from effinfer.quant import rtn

CASES = [(f, s) for f in FORMATS for s in (True, False) if s or not f.startswith("ternary")]


def squared_error(weight: torch.Tensor, quantized: LowBitWeight) -> float:
    return (weight.double() - quantized.dequantize(torch.float64)).square().sum().item()


def levels(quantized: LowBitWeight, row: int, group: int) -> torch.Tensor:
    """Every value a weight of one group can take, in float64."""
    layout = FORMATS[quantized.format]
    codes = torch.arange(layout.max_code + 1, dtype=torch.float64)
    if quantized.zero is None:
        values = layout.step * codes - layout.centre
    else:
        values = codes - quantized.zero[row, group].double()
    values = values * quantized.scale[row, group].double()
    return values if quantized.offset is None else values + quantized.offset[row, group].double()


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(CASES),
    n=st.integers(1, 5),
    k=st.integers(1, 140),
    group_size=st.sampled_from([32, 64, 1000]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_every_code_is_the_nearest(
    case: tuple[str, bool], n: int, k: int, group_size: int, dtype: torch.dtype, seed: int
) -> None:
    format, symmetric = case
    if format == "ternary_dense":
        group_size = 1000
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight[:, : k // 3] *= torch.rand(n, 1, generator=generator) > 0.3  # groups of zeros
    got = rtn(weight, format=format, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    assert got.scale.dtype == dtype
    value = got.dequantize(torch.float64)
    size = min(group_size, k)
    for row, column in itertools.product(range(n), range(k)):
        w = weight[row, column].double()
        best = (w - levels(got, row, column // size)).abs().min()
        assert (w - value[row, column]).abs() <= best + 1e-6 * (1 + w.abs())


@pytest.mark.parametrize(("format", "symmetric"), CASES)
def test_zeros_stay_zeros(format: str, symmetric: bool) -> None:
    got = rtn(torch.zeros(3, 64), format=format, group_size=64, symmetric=symmetric)
    assert got.dequantize().abs().max() == 0


@pytest.mark.parametrize("format", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_on_a_grid_comes_back(format: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = FORMATS[format]
    codes = torch.randint(layout.max_code + 1, (8, 64), generator=generator, dtype=torch.uint8)
    codes[:, 0], codes[:, 32] = 0, 0
    codes[:, 1], codes[:, 33] = layout.max_code, layout.max_code
    zero = None if symmetric else torch.full((8, 2), 1, dtype=torch.uint8)
    made = LowBitWeight(format, codes, torch.full((8, 2), 0.25).half(), 32, zero)
    again = rtn(made.dequantize(), format=format, group_size=32, symmetric=symmetric)
    assert torch.equal(again.dequantize(), made.dequantize())


def best_scale(weight: torch.Tensor, format: str) -> float:
    """The least squared error of any scale, by trying very many."""
    layout = FORMATS[format]
    values = layout.step * torch.arange(layout.max_code + 1.0).double() - layout.centre
    scales = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    grid = scales[:, None, None] * values
    off = (weight.double().view(1, -1, 1) - grid).abs().amin(-1)
    return off.square().sum(-1).min().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("format", "slack"),
    [("ternary", 1.001), ("binary", 1.001), ("int2", 1.03), ("int3", 1.03), ("int4", 1.03)],
)
def test_scales_are_about_the_best_there_are(format: str, slack: float, seed: int) -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
    options = {"format": format, "group_size": 64, "symmetric": True}
    got = rtn(weight, **options, scale_dtype=torch.float32)
    assert squared_error(weight, got) <= slack * best_scale(weight, format)


@pytest.mark.parametrize("format", ["int4", "int3", "int2", "binary"])
def test_zero_points_help_where_weights_are_off_centre(format: str) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) + 0.7
    errors = [
        squared_error(weight, rtn(weight, format=format, group_size=64, symmetric=symmetric))
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0]


def test_binary_offset_is_the_best_split() -> None:
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    got = rtn(weight, format="binary", group_size=32, symmetric=False, scale_dtype=torch.float32)
    ordered = weight.double().flatten().sort().values
    splits = [
        sum((part - part.mean()).square().sum().item() for part in (ordered[:i], ordered[i:]))
        for i in range(1, 32)
    ]
    assert squared_error(weight, got) == pytest.approx(min(splits), rel=1e-5)


def test_columns_that_matter_more_are_nearer() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    hessian = torch.ones(64)
    hessian[:8] = 1000
    plain, weighted = (rtn(weight, h, format="int2", group_size=64) for h in (None, hessian.diag()))

    def error(quantized: LowBitWeight) -> float:
        return (weight - quantized.dequantize())[:, :8].square().sum().item()

    assert error(weighted) < error(plain)


def test_bad_weights() -> None:
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(2, 32)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match="rtn: weight must be finite"):
            rtn(weight)
    with pytest.raises(TypeError, match="floating"):
        rtn(torch.ones(2, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 dimensions"):
        rtn(torch.ones(32))
    with pytest.raises(ValueError, match="group_size must be a multiple of 16"):
        rtn(torch.ones(2, 64), group_size=17)
    with pytest.raises(ValueError, match="take a wider scale_dtype"):
        rtn(torch.full((2, 32), 1e30))
    assert rtn(torch.full((2, 32), 1e30), scale_dtype=torch.float32).scale.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert rtn(torch.zeros(shape)).codes.shape == shape
