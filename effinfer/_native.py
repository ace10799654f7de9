"""Finds the native module that serves a tensor, and keeps the process-wide choices about it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from effinfer.errors import BackendUnavailableError

BACKENDS = ("auto", "cpu", "cuda", "cuda-shim", "reference")

_disabled = os.environ.get("EFFINFER_DISABLE", "") not in ("", "0")
_backend = "reference" if _disabled else "auto"
_modules: dict[str, ModuleType] = {}


def _lend_threads(module: ModuleType) -> None:
    """Lend the native code torch's own threads, through torch's stable C symbols."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        library = library.with_suffix(".dylib")
    torch_cpu = ctypes.CDLL(str(library))
    address = [
        ctypes.cast(getattr(torch_cpu, symbol), ctypes.c_void_p).value
        for symbol in ("torch_parallel_for", "torch_get_num_threads")
    ]
    module.use_pool(*address)


def module(name: str) -> ModuleType:
    """The native module ``_C`` (CPU), ``_C_cuda`` or ``_C_shim``, imported on first use."""
    found = _modules.get(name)
    if found is None:
        try:
            found = importlib.import_module(f"effinfer.{name}")
        except ImportError as error:
            raise BackendUnavailableError(
                f"effinfer.{name} is not in this installation ({error}); "
                "effinfer.backend_info() lists what is, and effinfer.use_reference() runs without it"
            ) from error
        found.use_tensor_type(torch.Tensor)
        if name != "_C_cuda":
            _lend_threads(found)
        threads = os.environ.get("EFFINFER_NUM_THREADS")
        if threads is not None:
            found.set_num_threads(int(threads))
        _modules[name] = found
    return found


def native(x: torch.Tensor) -> Any:
    """The native module for the device ``x`` is on."""
    if x.is_cpu:
        return _modules.get("_C") or module("_C") if _backend != "cuda-shim" else module("_C_shim")
    if x.is_cuda:
        return module("_C_cuda")
    raise BackendUnavailableError(
        f"no kernels for device '{x.device.type}' (there are: cpu, cuda); "
        "effinfer.use_reference() runs the plain-torch references on any device"
    )


def wants_reference() -> bool:
    """True while ops run their plain-torch references."""
    return _backend == "reference"


def set_backend(name: str) -> None:
    """Choose where ops run: "auto" (by device), "cpu", "cuda", "cuda-shim" or "reference".

    "cuda-shim" runs the CUDA sources' logic on the CPU, for tests. Raises ValueError for an unknown
    name and BackendUnavailableError when this installation lacks the backend.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"set_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    needed = {"cpu": "_C", "cuda": "_C_cuda", "cuda-shim": "_C_shim"}.get(name)
    if needed is not None:
        module(needed)
    _backend = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend(name)`` for a ``with`` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Run every op's plain-torch reference inside a ``with`` block."""
    with use_backend("reference"):
        yield


def set_num_threads(n: int) -> None:
    """Cap the threads effinfer's CPU kernels use; 0 follows ``torch.set_num_threads``."""
    if n < 0:
        raise ValueError(f"set_num_threads: n must be 0 or more, got {n}")
    module("_C").set_num_threads(n)


def backend_info() -> dict[str, Any]:
    """What runs here: versions, instruction set, threads, CUDA, and each op's kernel."""
    cpu = module("_C")
    info: dict[str, Any] = {
        "effinfer": cpu.__version__,
        "torch": torch.__version__,
        "backend": _backend,
        "isa": cpu.isa(),
        "threads": cpu.num_threads(),
        "kernels": cpu.kernels(),
    }
    for label, name in (("cuda", "_C_cuda"), ("cuda-shim", "_C_shim")):
        try:
            module(name)
            info[label] = "available" if label != "cuda" or torch.cuda.is_available() else "no GPU"
        except BackendUnavailableError:
            info[label] = "not built"
    return info
