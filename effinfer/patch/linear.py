"""``nn.Linear`` over a packed copy of its weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from effinfer import _native, ops
from effinfer.nn.stamp import Stamp, stamp
from effinfer.patch.swap import Patched

_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LinearWithPacked(Patched):
    """Multiplies by a packed weight, kept beside the parameter in a non-persistent buffer.

    The parameter stays what state_dict, saving and tying see. The packed copy follows it: it is made
    again when the parameter was loaded, moved, cast or written in place.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int
    _effinfer_packed: torch.Tensor
    _effinfer_stamp: Stamp

    def on_patch(self) -> None:
        """Pack the weight."""
        assert isinstance(self, nn.Module)
        # Outside inference mode, so that the packed weight may be used in any mode later.
        with torch.inference_mode(False), torch.no_grad():
            packed = ops.pack_linear(self.weight.detach())
        self.register_buffer("_effinfer_packed", packed, persistent=False)
        self._effinfer_stamp = stamp(self.weight)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        # Not left to the next call: a compiled graph does not look at versions.
        self.on_patch()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Not moved or cast with the rest: how weights are packed depends on their type.
        del self._effinfer_packed
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.on_patch()
        return self

    def packed(self) -> torch.Tensor:
        """The packed weight, made again if the parameter changed."""
        assert isinstance(self, nn.Module)
        # By dictionary: nn.Module's attribute lookup costs as much as the check.
        if self._effinfer_stamp != stamp(self._parameters["weight"]):
            self.on_patch()
        packed = self._buffers["_effinfer_packed"]
        assert packed is not None
        return packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``."""
        packed = self._effinfer_packed if torch.compiler.is_compiling() else self.packed()
        return ops.linear(input, packed, self.out_features, self.bias)


def lay_end_to_end(model: nn.Module) -> None:
    """Move the packed weights of ``model`` into one block of huge pages.

    A weight by itself begins and ends within a huge page, and is read there through small ones:
    together that costs 2 to 3 % of a token that Mamba-130M decodes.
    """
    layers = [m for m in model.modules() if isinstance(m, LinearWithPacked)]
    layers = [m for m in layers if m._effinfer_packed.is_cpu]
    sizes = [m._effinfer_packed.nbytes for m in layers]
    ends = list(accumulate(-(-size // _CACHE_LINE) * _CACHE_LINE for size in sizes))
    if not ends or ends[-1] < _HUGE_PAGE:
        return
    with torch.inference_mode(False), torch.no_grad():
        block = torch.empty(ends[-1] + _HUGE_PAGE, dtype=torch.uint8)
        block = block[-block.data_ptr() % _HUGE_PAGE :][: ends[-1]]
        _native.native(block).advise_huge_pages(block.view(torch.float32))
        for layer, start, size in zip(layers, [0, *ends], sizes, strict=False):
            packed = layer._effinfer_packed
            place = block[start : start + size].view(packed.dtype).view(packed.shape)
            layer._effinfer_packed = place.copy_(packed)


def linear_reasons(module: nn.Module) -> list[str]:
    """Why this linear cannot be packed."""
    dtype = module.weight.dtype
    if dtype not in _DTYPES:
        return [f"weight is {dtype}; packed weights are float32, bfloat16 or float16"]
    return []
