"""``nn.Linear`` over a packed copy of its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Apart, they cost 2 to 3 % more of a token that Mamba-130M decodes.
    """
    layers = [m for m in model.modules() if isinstance(m, LinearWithPacked)]
    layers = [m for m in layers if m._effinfer_packed.is_cpu]
    places = end_to_end([m._effinfer_packed for m in layers])
    for layer, place in zip(layers, places, strict=True):
        layer._effinfer_packed = place


def end_to_end(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The weights in one block of huge pages; as they are where they do not fill one.

    A weight by itself begins and ends within a huge page, and is read there through small ones.
    """
    ends = list(accumulate(-(-w.nbytes // _CACHE_LINE) * _CACHE_LINE for w in weights))
    if not ends or ends[-1] < _HUGE_PAGE:
        return list(weights)
    with torch.inference_mode(False), torch.no_grad():
        block = torch.empty(ends[-1] + _HUGE_PAGE, dtype=torch.uint8)
        block = block[-block.data_ptr() % _HUGE_PAGE :][: ends[-1]]
        _native.native(block).advise_huge_pages(block.view(torch.float32))
        places = [
            block[start : start + w.nbytes].view(w.dtype).view(w.shape)
            for w, start in zip(weights, [0, *ends], strict=False)
        ]
        return [place.copy_(w) for place, w in zip(places, weights, strict=True)]


def linear_reasons(module: nn.Module) -> list[str]:
    """Why this linear cannot be packed."""
    dtype = module.weight.dtype
    if dtype not in _DTYPES:
        return [f"weight is {dtype}; packed weights are float32, bfloat16 or float16"]
    return []
