"""GPTQ and QuantEase: against plain float64 code, against each other, and on awkward inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight
from effinfer.quant import gptq, gptq_then_quantease, output_error, quantease, rtn
from effinfer.quant.grid import fit_grid, nearest, value

METHODS: list[Callable[..., LowBitWeight]] = [gptq, quantease, gptq_then_quantease]


def layer(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and X^T X of inputs that share a quarter as many factors as there are columns."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(max(k // 4, 1), k, generator=generator)
    x = torch.randn(4 * k, factors.shape[0], generator=generator) @ factors
    x += 0.3 * x.std() * torch.randn(x.shape, generator=generator)
    return torch.randn(n, k, generator=generator), x.t() @ x


def error(quantized: LowBitWeight, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return output_error(weight, quantized.dequantize(), hessian)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("format", "group_size", "cut"), [("int4", 64, 0.97), ("int3", 128, 0.95), ("int2", 32, 0.9)]
)
def test_each_method_beats_the_one_before(
    format: str, group_size: int, cut: float, seed: int
) -> None:
    weight, hessian = layer(48, 128, seed)
    options: dict[str, Any] = {"format": format, "group_size": group_size}
    nearest_error, gptq_error, both_error = (
        error(method(weight, hessian, **options), weight, hessian)
        for method in (rtn, gptq, gptq_then_quantease)
    )
    assert gptq_error < 0.8 * nearest_error
    assert both_error < cut * gptq_error


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("format", "cut"), [("int3", 0.96), ("int2", 0.9)])
def test_quantease_beats_gptq_by_itself(format: str, cut: float, seed: int) -> None:
    weight, hessian = layer(48, 128, seed)
    options: dict[str, Any] = {"format": format, "group_size": 32}
    gptq_error, quantease_error = (
        error(method(weight, hessian, **options), weight, hessian) for method in (gptq, quantease)
    )
    assert quantease_error < cut * gptq_error


@pytest.mark.parametrize("seed", range(3))
def test_descent_from_gptq_is_never_worse_and_near_the_whole_descent(seed: int) -> None:
    weight, hessian = layer(48, 128, seed)
    options: dict[str, Any] = {"format": "int3", "group_size": 64}
    start = gptq(weight, hessian, **options)
    for sweeps in (1, 2, 10):
        found = quantease(weight, hessian, format="int3", start=start, sweeps=sweeps)
        assert error(found, weight, hessian) <= error(start, weight, hessian)
        assert torch.equal(found.scale, start.scale)
    both = error(gptq_then_quantease(weight, hessian, **options), weight, hessian)
    assert both <= 1.06 * error(quantease(weight, hessian, **options), weight, hessian)


def plain_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, format: str, group: int
) -> torch.Tensor:
    """GPTQ as the paper writes it: the inverse shrinks by a row and column for each weight done."""
    grid = fit_grid("gptq", weight, format, group, importance=hessian.diagonal())
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    left, codes = weight.double(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        column = grid.columns()[j // group]
        codes[:, j] = nearest(format, left[:, j].float(), column)
        off = (left[:, j] - value(format, codes[:, j], column).double()) / inverse[j, j]
        left = left - off[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("format", ["int4", "int2", "binary"])
def test_gptq_is_the_papers_recursion(format: str) -> None:
    weight, hessian = layer(16, 192, 0)  # more than one block of 128 columns
    got = gptq(weight, hessian, format=format, group_size=64, act_order=False)
    want = plain_gptq(weight, hessian, format, 64)
    assert (got.codes != want).float().mean() < 5e-3  # float32 against float64, near ties


def plain_quantease(
    weight: torch.Tensor, hessian: torch.Tensor, format: str, group: int, sweeps: int
) -> torch.Tensor:
    """The paper's cyclic descent, a column at a time from the whole residual."""
    grid = fit_grid("quantease", weight, format, group, importance=hessian.diagonal())
    wide, values, codes = hessian.double(), weight.double(), torch.zeros_like(weight)
    for sweep in range(sweeps):
        for j in range(weight.shape[1]):
            pull = (weight.double() - values) @ wide[:, j] / wide[j, j]
            aim = values[:, j] + pull
            if sweep % 3 == 1 and sweep < sweeps - 1:
                values[:, j] = aim
                continue
            column = grid.columns()[j // group]
            codes[:, j] = nearest(format, aim.float(), column)
            values[:, j] = value(format, codes[:, j], column).double()
    return codes.to(torch.uint8)


@pytest.mark.parametrize("format", ["int3", "ternary"])
def test_quantease_is_the_papers_descent(format: str) -> None:
    weight, hessian = layer(16, 192, 0)
    got = quantease(weight, hessian, format=format, group_size=64, sweeps=4)
    want = plain_quantease(weight, hessian, format, 64, 4)
    # A near tie decided otherwise moves what comes after it.
    assert (got.codes != want).float().mean() < 2e-2


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    format=st.sampled_from(list(FORMATS)),
    n=st.integers(1, 6),
    k=st.integers(1, 150),
    seed=st.integers(0, 100),
)
def test_any_shape_and_no_worse_than_nothing(
    method: Callable[..., LowBitWeight], format: str, n: int, k: int, seed: int
) -> None:
    weight, hessian = layer(n, k, seed)
    group_size = k if format == "ternary_dense" else 32
    got = method(weight, hessian, format=format, group_size=group_size)
    assert got.codes.shape == (n, k)
    assert got.format == format
    assert got.order is None
    assert error(got, weight, hessian) <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_columns_never_seen_are_rounded_to_the_nearest(
    method: Callable[..., LowBitWeight],
) -> None:
    weight, hessian = layer(8, 64, 0)
    dead = torch.arange(0, 64, 5)
    hessian[dead], hessian[:, dead] = 0, 0
    got = method(weight, hessian, format="int4", group_size=32)
    grid = fit_grid("test", weight, "int4", 32, importance=hessian.diagonal())
    assert torch.equal(got.codes[:, dead], grid.codes(weight)[:, dead])


@pytest.mark.parametrize("method", METHODS)
def test_no_input_at_all_is_rounding_to_the_nearest(method: Callable[..., LowBitWeight]) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    got = method(weight, torch.zeros(64, 64), format="int4", group_size=32)
    assert torch.equal(got.codes, rtn(weight, torch.zeros(64, 64), group_size=32).codes)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_inputs_than_columns(method: Callable[..., LowBitWeight]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(8, 64, generator=generator) for _ in range(2))
    x = x[:3]
    hessian = x.t() @ x  # of rank 3
    got = method(weight, hessian, format="int4", group_size=32)
    plain = rtn(weight, hessian, format="int4", group_size=32)
    assert error(got, weight, hessian) < 0.5 * error(plain, weight, hessian)


def test_undamped_gptq_raises_its_damping() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    got = gptq(weight, torch.ones(32, 32), damping=0.0, group_size=32)
    assert got.dequantize().isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(method: Callable[..., LowBitWeight]) -> None:
    weight, hessian = layer(4, 32, 0)
    with pytest.raises(ValueError, match=r"hessian must have shape \(32, 32\)"):
        method(weight, hessian[:16])
    hessian[0, 1] = torch.nan
    with pytest.raises(ValueError, match="hessian must be finite"):
        method(weight, hessian)
    weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight must be finite"):
        method(weight, torch.eye(32))
    with pytest.raises(ValueError, match="negative diagonal"):
        method(torch.ones(4, 32), -torch.eye(32))


def test_quantease_bad_start() -> None:
    weight, hessian = layer(4, 32, 0)
    start = rtn(weight, group_size=32)
    with pytest.raises(ValueError, match="start must be of the same format"):
        quantease(weight, hessian, format="int3", start=start)
    with pytest.raises(ValueError, match="sweeps must be 1 or more"):
        quantease(weight, hessian, sweeps=0)
