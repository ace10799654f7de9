"""Shared by all tests: the backends an op test runs on, and how errors are measured."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

import effinfer
from effinfer import _native

# A CPU backend is named by the instruction set it is capped to.
CPU_ISAS = (
    ("scalar", "neon")
    if platform.machine() == "aarch64"
    else ("scalar", "avx2", "avx512", "avx512vnni")
)
BACKENDS = (*CPU_ISAS, "cuda-shim", "cuda")

# The default error bounds, relative L2 against float64.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = tuple(BOUNDS)


def _missing(backend: str) -> str | None:
    """Why this machine or build can't run a backend, or None when it can."""
    if backend in CPU_ISAS:
        cpu = _native.module("_C")
        before = cpu.isa()
        cpu.set_isa(backend)
        reached = cpu.isa()
        cpu.set_isa("")
        return None if reached == backend else f"this CPU has no {backend} (best: {before})"
    state = effinfer.backend_info()[backend]
    return None if state == "available" else f"{backend}: {state}"


def pytest_report_header() -> str:
    info = effinfer.backend_info()
    ran = [name for name in BACKENDS if _missing(name) is None]
    return f"effinfer {info['effinfer']}, torch {info['torch']}, backends run: {', '.join(ran)}"


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per backend; gives the torch device its tensors belong on."""
    backend: str = request.param
    reason = _missing(backend)
    if reason is not None:
        pytest.skip(reason)
    if backend in CPU_ISAS:
        _native.module("_C").set_isa(backend)
        yield "cpu"
        _native.module("_C").set_isa("")
    elif backend == "cuda-shim":
        with effinfer.use_backend("cuda-shim"):
            yield "cpu"
    else:
        yield "cuda"


@pytest.fixture(params=CPU_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction set of the CPU."""
    reason = _missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    _native.module("_C").set_isa(request.param)
    yield request.param
    _native.module("_C").set_isa("")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Ops are for inference; a test that is about gradients turns them on itself."""
    with torch.no_grad():
        yield


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error of ``got`` against the float64 tensor ``want``."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape
    scale = want.norm().item()
    error = (got - want).norm().item()
    return error / scale if scale > 0 else error


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float | None = None) -> None:
    """Relative L2 error within ``bound`` (by default the stated one of ``got``'s dtype), and no
    single element off by more than ten times that bound of the largest one."""
    bound = BOUNDS[got.dtype] if bound is None else bound
    assert relative_error(got, want) <= bound
    if want.numel():
        off = (got.detach().cpu().double() - want.detach().cpu().double()).abs().max()
        assert off <= 10 * bound * want.abs().max().clamp_min(1e-30)
