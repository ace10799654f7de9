"""effinfer's low-bit linears as sides, and which build of effinfer they run."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import torch

from bench.peers.common import Side
from bench.peers.lowbit_case import Case

ROOT = Path(__file__).parents[2]
INSTALLED = {"action": "store_true", "help": "measure the installed effinfer"}


def quantized(case: Case, format: str, group: int) -> Any:
    """The case's weight rounded to the nearest symmetric code, float16 scales."""
    from effinfer.ops.lowbit_weight import FORMATS, LowBitWeight

    layout = FORMATS[format]
    grouped = case.weight().view(case.outputs, -1, group)
    largest = layout.step * layout.max_code - layout.centre
    scale = (grouped.abs().amax(2) / largest).half()
    values = (grouped / scale[..., None].float()).clamp(-layout.centre, largest)
    codes = ((values + layout.centre) / layout.step).round().to(torch.uint8)
    return LowBitWeight(format, codes.view(case.outputs, case.inputs), scale, group)


def _tensors(packed: Any) -> dict[str, torch.Tensor]:
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def linear(case: Case, format: str, *, activations: str = "int8", group: int = 128) -> Side:
    """lowbit_linear; with int8 activations x is quantized in each call."""
    from effinfer import ops

    x = case.x()
    plain = quantized(case, format, min(group, case.inputs))
    packed = ops.pack_lowbit(plain)
    read = sum(tensor.nbytes for tensor in _tensors(packed).values())

    # Packed again rather than cloned: packing is what asks for huge pages.
    turn = case.turns(packed, read, lambda _: ops.pack_lowbit(plain))
    truth = case.truth(plain.dequantize())
    return Side(lambda: ops.lowbit_linear(x, turn(), activations=activations), None, truth, read)


def use_installed() -> None:
    """Makes `import effinfer` find the installed package, not the tree this module lies in."""
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT]
    try:
        import effinfer
    except ImportError as error:
        raise SystemExit(f"--installed: no effinfer outside this tree: {error}") from error
    if Path(effinfer.__file__).is_relative_to(ROOT):
        raise SystemExit("--installed: the effinfer that is installed is this tree's")


def build(op: str) -> dict[str, str]:
    """Which effinfer is measured: installed or in place, its version, and its compiler."""
    import effinfer
    from effinfer import _C, ops

    library = Path(_C.__file__)
    # The C start files name GCC in every library, so clang counts wherever it is named.
    content = library.read_bytes()
    named = re.search(rb"clang version [\d.]+", content) or re.search(
        rb"GCC: \([^)]*\) [\d.]+", content
    )
    return {
        "build": "in place" if library.is_relative_to(ROOT) else "installed",
        "version": effinfer.__version__,
        "compiler": named.group().decode() if named else "not recorded in the library",
        "isa": getattr(ops, op).isa(),
    }
