"""``nn.Linear`` on a weight of 8 bits down to 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import is_grad_enabled, nn
from torch.compiler import is_compiling

from effinfer._native import native, wants_reference
from effinfer.ops.lowbit_linear import (
    ACTIVATIONS,
    PackedLowBit,
    lowbit_linear,
    pack_lowbit,
    unpack_lowbit,
)
from effinfer.ops.lowbit_pack import new_packed
from effinfer.ops.lowbit_weight import (
    FORMATS,
    PANEL,
    SCALE_DTYPES,
    LowBitWeight,
    check_group_size,
    groups,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("packed", "scale", "zero", "offset", "order")


class LowBitLinear(nn.Module):
    """``x W^T + bias`` for inference, ``W`` packed in one of the low-bit formats.

    ``LowBitLinear(K, N, ...)`` is a layer of zeros to load a state into; :meth:`from_weight` makes
    one of a quantized weight. ``state_dict`` holds the packed tensors as they are and
    ``description``, the bytes of a JSON text by which a state that is loaded is checked. Casting the
    module casts the bias alone: codes and scales are what they are.

    Args:
        in_features, out_features: ``K`` and ``N``.
        bias: whether there is one.
        format: a name in ``effinfer.ops.lowbit_weight.FORMATS``.
        group_size: columns per scale; ``K`` or more for one scale a row.
        activations: "int8" quantizes each row of the input too; "f32" takes it as it is.
        scale_dtype: float16, bfloat16 or float32.
        zero, offset, order: whether the weight has these parts of a ``LowBitWeight``.

    Raises:
        ValueError, TypeError: a format, group size, dtype or activations that do not exist.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    offset: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None
    description: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int4",
        group_size: int = 128,
        activations: str = "int8",
        scale_dtype: torch.dtype = torch.float16,
        zero: bool = False,
        offset: bool = False,
        order: bool = False,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(
                f"LowBitLinear: format must be one of {', '.join(FORMATS)}, got {format!r}"
            )
        if scale_dtype not in SCALE_DTYPES:
            raise TypeError(
                f"LowBitLinear: scale_dtype must be float16, bfloat16 or float32, got {scale_dtype}"
            )
        check_group_size(format, group_size, in_features)
        layout, panels = FORMATS[format], -(-out_features // PANEL)
        group_size = min(group_size, max(in_features, 1))
        units = -(-in_features // layout.unit)
        shape = (panels, groups(in_features, group_size), PANEL)
        packed = PackedLowBit(
            format,
            out_features,
            in_features,
            group_size,
            new_packed(torch.empty(0), panels, units, layout.unit_bytes).zero_(),
            torch.zeros(shape, dtype=scale_dtype),
            torch.zeros(shape, dtype=torch.uint8) if zero else None,
            torch.zeros(shape, dtype=scale_dtype) if offset else None,
            torch.arange(in_features) if order else None,
        )
        super().__init__()
        self._hold(packed, torch.zeros(out_features) if bias else None, activations)

    @classmethod
    def from_weight(
        cls,
        weight: LowBitWeight,
        bias: torch.Tensor | None = None,
        *,
        activations: str = "int8",
    ) -> LowBitLinear:
        """A layer of ``weight``, packed now, and ``bias`` ``(N,)``."""
        if bias is not None and bias.shape != (weight.out_features,):
            raise ValueError(
                f"LowBitLinear: bias must have shape ({weight.out_features},), "
                f"got {tuple(bias.shape)}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(pack_lowbit(weight), None if bias is None else bias.detach(), activations)
        return layer

    def _hold(self, packed: PackedLowBit, bias: torch.Tensor | None, activations: str) -> None:
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"LowBitLinear: activations must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activations!r}"
            )
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.format, self.group_size = packed.format, packed.group_size
        self.activations = activations
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        text = list(json.dumps(self._contents()).encode())
        self.register_buffer("description", packed.packed.new_tensor(text))
        self._weight = packed

    def describe(self) -> dict[str, Any]:
        """What the constructor needs for a layer that takes this one's state, as JSON values."""
        return {**self._contents(), "activations": self.activations}

    def _contents(self) -> dict[str, Any]:
        """What the tensors are; how the layer treats its input is not in them."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "format": self.format,
            "group_size": self.group_size,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
            **{name: getattr(self, name) is not None for name in ("zero", "offset", "order")},
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> LowBitLinear:
        """The inverse of :meth:`describe`: a layer of zeros on the default device.

        Raises:
            ValueError, TypeError: a description that none of ours could be.
        """
        options = dict(description)
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
        scale_dtype = options.pop("scale_dtype", None)
        if scale_dtype not in dtypes:
            raise ValueError(
                f"LowBitLinear: scale_dtype must be one of {', '.join(dtypes)}, got {scale_dtype!r}"
            )
        for name in ("in_features", "out_features", "group_size"):
            size = options.get(name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise ValueError(f"LowBitLinear: {name} must be a size, got {size!r}")
        return cls(**options, scale_dtype=dtypes[scale_dtype])

    def packed_weight(self) -> PackedLowBit:
        """The weight as ``ops.lowbit_linear`` takes it; its tensors are this layer's buffers."""
        kept, now = self._weight, self._buffers  # by dictionary: attribute lookup is slow
        if (
            kept.packed is not now["packed"]
            or kept.scale is not now["scale"]
            or kept.zero is not now["zero"]
            or kept.offset is not now["offset"]
            or kept.order is not now["order"]
        ):
            parts: Any = {name: now[name] for name in PARTS}
            kept = self._weight = PackedLowBit(
                self.format, self.out_features, self.in_features, self.group_size, **parts
            )
        return kept

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight ``(N, K)``, made anew each time."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.lowbit_weight().dequantize(dtype)

    def lowbit_weight(self) -> LowBitWeight:
        """The weight as numbers, unpacked into new tensors."""
        return unpack_lowbit(self.packed_weight())[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., K)`` to ``(..., N)``."""
        weight, bias = self.packed_weight(), self._buffers["bias"]
        if (
            is_compiling()
            or type(x) is not torch.Tensor
            or not x.is_contiguous()
            or x.dtype not in _FLOATS
            or weight.order is not None
            or (bias is not None and bias.dtype is not torch.float32)
            or is_grad_enabled()
            or wants_reference()
        ):
            return lowbit_linear(x, weight, bias, activations=self.activations)
        # What is left of the op where none of that is so; small layers feel the difference.
        # Sizes one by one: a tuple of them takes new_empty 0.7 us more.
        y = x.new_empty(*x.shape[:-1], weight.out_features)
        native(x).lowbit_linear(
            x, weight.packed, weight.scale, weight.zero, weight.offset, bias, None, None, None,
            weight.format, weight.out_features, weight.in_features, weight.group_size,
            self.activations == "int8", "none", 0, 0, y,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, group_size={self.group_size}, "
            f"activations={self.activations}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        ours = {name: self._buffers[name] for name in (*PARTS, "description")}
        moved = {name: _moved(part, fn) for name, part in ours.items()}
        self._buffers.update(dict.fromkeys(ours))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            ours = moved
        finally:
            self._buffers.update(ours)
        return self

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
        given = state_dict.get(prefix + "description")
        if given is not None and (problem := self.mismatch(given)):
            error_msgs.append(f"{prefix.removesuffix('.') or 'LowBitLinear'}: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def mismatch(self, description: torch.Tensor) -> str | None:
        """Why a state with this ``description`` is not this layer's; None where it is."""
        try:
            given = json.loads(bytes(description.tolist()))
        except (TypeError, ValueError):
            return "its description is not a JSON text"
        own = self._contents()
        if not isinstance(given, dict) or given.keys() != own.keys():
            return f"its description is not one of a LowBitLinear: {given!r}"
        wrong = [name for name in own if given[name] != own[name]]
        if not wrong:
            return None
        return "; ".join(f"{n} is {given[n]!r}, the layer's is {own[n]!r}" for n in wrong)


def _moved(
    part: torch.Tensor | None, fn: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """``fn(part)`` where ``fn`` moves; without its cast where it casts."""
    if part is None:
        return None
    moved = fn(part)
    return moved if moved.dtype == part.dtype else part.to(moved.device)


class NormedLowBitLinear(nn.Module):
    """BitNet's linear with an RMSNorm of its own inside: ``linear(norm(x))``.

    Args:
        linear: what the normed input goes through.
        eps: added to the mean square.
    """

    def __init__(self, linear: LowBitLinear, eps: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.norm = nn.RMSNorm(linear.in_features, eps=eps)
        self.norm.weight.requires_grad_(False)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``(..., in_features)``."""
        return cast(torch.Tensor, self.linear(self.norm(x)))
