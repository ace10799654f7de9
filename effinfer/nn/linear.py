"""A drop-in ``nn.Linear`` on packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from effinfer.ops import linear, pack_linear, unpack_linear


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference: one packed copy of the weight instead of the plain one.

    Made from an ``nn.Linear`` (``PackedLinear(layer)``); ``state_dict`` keeps that layer's keys and
    shapes in both directions, and changing dtype or device packs again.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Linear, epilogue: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.epilogue = epilogue
        self.register_buffer("packed", pack_linear(layer.weight), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, unpacked into a new tensor."""
        return unpack_linear(self.packed, self.out_features)[0]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return linear(
            x, self.packed, self.out_features, self.bias, epilogue=self.epilogue, residual=residual
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, epilogue={self.epilogue}, dtype={self.packed.dtype}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast of the packed tensor would not be the packed cast: bfloat16 panels are interleaved.
        weight = fn(self.weight)
        packed, self.packed = self.packed, self.packed.new_empty(0)
        cast(Any, super())._apply(fn, recurse)
        same = weight.dtype == packed.dtype and weight.device == packed.device
        self.packed = packed if same else pack_linear(weight)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight = state_dict.get(key)
        if weight is None:
            missing_keys.append(key)
        elif weight.shape != (self.out_features, self.in_features):
            error_msgs.append(
                f"size mismatch for {key}: got {tuple(weight.shape)}, "
                f"the layer has {(self.out_features, self.in_features)}"
            )
        else:
            self.packed = pack_linear(weight.to(self.packed))
