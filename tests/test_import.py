"""Importing effinfer is quick and changes nothing in torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import json, sys, types
import torch, transformers
import transformers.models.mamba.modeling_mamba as mamba

def snapshot(root):
    return {
        f"{name}.{key}": id(value)
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and name.split(".")[0] == root
        for key, value in vars(module).items()
        if not key.startswith("__")
    }

before = {root: snapshot(root) for root in ("torch", "transformers")}
state = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
import effinfer
changed = [
    key
    for root, items in before.items()
    for key, value in snapshot(root).items()
    if key in items and items[key] != value
]
assert state == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
print(json.dumps(changed))
"""

TIMER = """
import time, torch
start = time.perf_counter()
import effinfer
print(time.perf_counter() - start)
import sys
assert "transformers" not in sys.modules, "importing effinfer must not import transformers"
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_changes_no_module():
    assert json.loads(run(PROBE)) == []


def test_import_brings_in_neither_transformers_nor_the_command_line():
    run(TIMER)
    run("import effinfer, sys; assert 'typer' not in sys.modules and 'rich' not in sys.modules")


def test_unknown_isa_is_an_error():
    result = subprocess.run(
        [sys.executable, "-c", "import effinfer; effinfer.backend_info()"],
        env={**os.environ, "EFFINFER_ISA": "avx3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "EFFINFER_ISA" in result.stderr
    assert "avx3" in result.stderr
