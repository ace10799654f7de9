"""``nn.Linear`` over a low-bit copy of its weight: ``patch(quantize=)``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from effinfer.errors import UnsupportedModelError
from effinfer.nn.lowbit import PARTS, LowBitLinear
from effinfer.nn.stamp import Stamp, stamp
from effinfer.ops.lowbit_linear import PackedLowBit, lowbit_linear
from effinfer.patch.swap import Patched
from effinfer.quant.config import QuantConfig
from effinfer.quant.quantize import quantize_linear


class LinearWithLowBit(Patched):
    """Multiplies by a low-bit copy of its weight; the float parameter stays beside it.

    The parameter is what state_dict, saving, tying and ``unpatch`` see, so this makes a model faster
    and not smaller. Where the parameter's values change, a copy rounded to the nearest is made
    again; one that came from calibration cannot be, and the next call says so. Moving takes the
    copy along, casting leaves it as it is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    _effinfer_packed: PackedLowBit
    _effinfer_config: QuantConfig
    _effinfer_stamp: Stamp
    _effinfer_digest: bytes

    def hold(self, made: LowBitLinear, config: QuantConfig) -> None:
        """Keep the copy that ``made`` has, of the present weight."""
        self._effinfer_packed = made.packed_weight()
        self._effinfer_config = config
        self._note_weight()

    def _note_weight(self) -> None:
        self._effinfer_stamp, self._effinfer_digest = stamp(self.weight), _digest(self.weight)

    def _follow(self) -> None:
        """Make the copy again if the weight has other values now."""
        assert isinstance(self, nn.Module)
        if _digest(self.weight) != self._effinfer_digest:
            config = self._effinfer_config
            if config.needs_calibration:
                raise UnsupportedModelError(
                    f"the weight of a linear quantized by {config.method!r} changed after "
                    "calibration: call effinfer.unpatch(model), then patch it again"
                )
            made = quantize_linear(self, config, format=self._effinfer_packed.format)
            self._effinfer_packed = made.packed_weight()
        self._note_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        # Not left to the next call: a compiled graph does not look at versions.
        self._follow()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        packed, device = self._effinfer_packed, self.weight.device
        moved: Any = {
            name: part.to(device) for name in PARTS if (part := getattr(packed, name)) is not None
        }
        self._effinfer_packed = replace(packed, **moved)
        self._note_weight()
        return self

    @property
    def activations(self) -> str:
        """How it treats its input."""
        return self._effinfer_config.activations

    def packed_weight(self) -> PackedLowBit:
        """The low-bit copy, made again if the parameter changed."""
        assert isinstance(self, nn.Module)
        # By dictionary: nn.Module's attribute lookup costs as much as the check.
        if self._effinfer_stamp != stamp(self._parameters["weight"]):
            self._follow()
        return self._effinfer_packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` times the copy, and the bias."""
        packed = self._effinfer_packed if torch.compiler.is_compiling() else self.packed_weight()
        return lowbit_linear(input, packed, self.bias, activations=self.activations)


def _digest(weight: torch.Tensor) -> bytes:
    values: Any = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(values, digest_size=16).digest()
