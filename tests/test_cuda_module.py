"""The CUDA module on a machine without a GPU: loading it is safe, and it refuses politely."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import effinfer
from effinfer import _native
from effinfer.errors import BackendUnavailableError

_STATE = effinfer.backend_info()["cuda"]


@pytest.fixture
def cuda_module():
    if _STATE == "not built":
        pytest.skip("cuda: not built (tools/check_cuda.sh builds it)")
    return _native.module("_C_cuda")


def test_cpu_tensors_are_refused(cuda_module):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="rms_norm: x must be on device cuda, got cpu"):
        cuda_module.rms_norm(x, None, 1e-6, None, False, torch.empty_like(x), None)


def test_loads_without_torch_touching_a_driver(cuda_module):
    """In a fresh process, before anything else: no driver is needed to load the module."""
    code = (
        "import torch; from effinfer import _native; print(_native.module('_C_cuda').__version__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == effinfer.__version__


def test_backend_info_tells_a_missing_gpu_from_a_missing_module():
    assert _STATE in ("available", "no GPU", "not built")
    if torch.cuda.is_available():
        assert _STATE != "no GPU"
    else:
        assert _STATE != "available"


@pytest.mark.skipif(_STATE != "not built", reason="cuda: built")
def test_missing_module_is_named():
    with pytest.raises(BackendUnavailableError, match="_C_cuda is not in this installation"):
        _native.module("_C_cuda")
