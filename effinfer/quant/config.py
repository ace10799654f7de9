"""What to quantize and how: a validated value that survives JSON and that transformers takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from effinfer.ops.lowbit_weight import FORMATS

Bits = float | str  # a number of bits, or a format's name

FORMAT_OF_BITS: dict[float, str] = {
    8: "int8",
    4: "int4",
    3: "int3",
    2: "int2",
    1.58: "ternary",
    1: "binary",
}
METHODS = ("rtn", "gptq", "quantease", "gptq+cd")
ACTIVATIONS = ("int8", "f32")
SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
QUANT_METHOD = "effinfer"  # what config.json calls it


def format_of(bits: Bits) -> str:
    """The format of a number of bits (8, 4, 3, 2, 1.58, 1), or of a format's name."""
    if isinstance(bits, str) and bits in FORMATS:
        return bits
    if not isinstance(bits, bool) and isinstance(bits, (int, float)) and bits in FORMAT_OF_BITS:
        return FORMAT_OF_BITS[bits]
    raise ValueError(
        f"bits must be one of {', '.join(map(str, FORMAT_OF_BITS))}, or a format among "
        f"{', '.join(FORMATS)}, got {bits!r}"
    )


@dataclass(frozen=True)
class QuantConfig:
    """How ``quantize_``, ``patch(quantize=)`` and transformers' ``from_pretrained`` quantize a model.

    Attributes:
        bits: 8, 4, 3, 2, 1.58 (ternary) or 1, or a format's name: int8, int4, int3, int2, ternary,
            ternary_dense (5/3 bits, one scale a row) or binary.
        group_size: columns that share a scale, a multiple of 16 (32 for 3 bits and 1); -1 for whole
            rows. Rows shorter than it are one group.
        method: "rtn" (nearest, no calibration), "gptq", "quantease", or "gptq+cd" (QuantEase's
            coordinate descent from GPTQ's result). All but "rtn" need calibration data.
        activations: "int8" quantizes each row of the layer's input too; "f32" leaves it.
        symmetric: False for a zero point in every group (a float offset at 1 bit); None for the
            format's usual: a zero point at 2 and 3 bits, where a fixed centre wastes codes.
        scale_dtype: "float16", "bfloat16" or "float32".
        exclude: glob patterns; layers whose full name or its last part matches stay in float.
        plan: bits by layer name, as ``plan_bits`` gives it; None leaves that layer in float. Layers
            it does not name get ``bits``.
        quantize_head: whether a language model's output projection is quantized too.
        damping: GPTQ's share of the mean diagonal added to the Hessian.
        sweeps: of coordinate descent; None for 25, or 10 after GPTQ.
        layers: what was quantized, by layer name; ``quantize_`` writes it for saving.

    Raises:
        ValueError, TypeError: a field that is out of range.
    """

    bits: Bits = 4
    group_size: int = 128
    method: str = "rtn"
    activations: str = "int8"
    symmetric: bool | None = None
    scale_dtype: str = "float16"
    exclude: tuple[str, ...] = ()
    plan: Mapping[str, Bits | None] = field(default_factory=dict)
    quantize_head: bool = False
    damping: float = 0.01
    sweeps: int | None = None
    layers: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        patterns = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        object.__setattr__(self, "exclude", patterns)
        object.__setattr__(self, "plan", dict(self.plan))
        _number("group_size", self.group_size, int)
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"QuantConfig: group_size must be -1 or positive, got {self.group_size}"
            )
        _among("method", self.method, METHODS)
        _among("activations", self.activations, ACTIVATIONS)
        _among("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        if self.symmetric is not None and not isinstance(self.symmetric, bool):
            raise TypeError(
                f"QuantConfig: symmetric must be a bool or None, got {self.symmetric!r}"
            )
        if any(not isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"QuantConfig: exclude must hold strings, got {self.exclude!r}")
        _number("damping", self.damping, float)
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"QuantConfig: damping must be 0 or more, got {self.damping}")
        if self.sweeps is not None:
            _number("sweeps", self.sweeps, int)
            if self.sweeps < 1:
                raise ValueError(f"QuantConfig: sweeps must be 1 or more, got {self.sweeps}")
        try:
            used = {format_of(self.bits)}
            used |= {format_of(bits) for bits in self.plan.values() if bits is not None}
        except ValueError as error:
            raise ValueError(f"QuantConfig: {error}") from None
        if self.symmetric is False and any(name.startswith("ternary") for name in used):
            raise ValueError("QuantConfig: symmetric must not be False: ternary has no zero point")

    @property
    def quant_method(self) -> str:
        """The name transformers knows this by.

        Only transformers asks for it, to look it up in its registry of quantizers: asking is what
        puts effinfer there.
        """
        register_with_transformers()
        return QUANT_METHOD

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at the layers' inputs."""
        return self.method != "rtn"

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """``scale_dtype`` as torch has it."""
        return SCALE_DTYPES[self.scale_dtype]

    def format_for(self, name: str) -> str | None:
        """The format of the layer called ``name``, or None where it stays in float."""
        bits = self.plan.get(name, self.bits)
        return None if bits is None or self.excludes(name) else format_of(bits)

    def excludes(self, name: str) -> bool:
        """Whether ``exclude`` names this layer."""
        last = name.rpartition(".")[2]
        return any(fnmatchcase(name, p) or fnmatchcase(last, p) for p in self.exclude)

    def columns_per_scale(self, format: str, in_features: int) -> int:
        """``group_size`` as the layer's ``LowBitWeight`` takes it."""
        whole = self.group_size == -1 or format == "ternary_dense"
        return max(in_features, 1) if whole else min(self.group_size, max(in_features, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with transformers' ``quant_method``."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["exclude"] = list(self.exclude)
        plain["plan"] = dict(self.plan)
        if self.layers is not None:
            plain["layers"] = {name: dict(layer) for name, layer in self.layers.items()}
        return {"quant_method": QUANT_METHOD, **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **_: Any) -> QuantConfig:
        """The inverse of :meth:`to_dict`."""
        given = dict(values)
        method = given.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"QuantConfig: quant_method must be {QUANT_METHOD!r}, got {method!r}")
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"QuantConfig: unknown fields {', '.join(unknown)}")
        return cls(**given)

    def to_json(self) -> str:
        """As a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QuantConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def register_with_transformers() -> None:
    """Add effinfer to transformers' registry of quantizers, once; imports transformers.

    Needed before ``from_pretrained`` of a folder that was saved quantized, as importing effinfer
    changes nothing in transformers. Giving ``from_pretrained`` a ``QuantConfig`` does it too.
    """
    from effinfer.quant.hf import register

    register()


def _number(name: str, value: object, kind: type) -> None:
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"QuantConfig: {name} must be {kind.__name__}, got {value!r}")


def _among(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"QuantConfig: {name} must be one of {', '.join(allowed)}, got {value!r}")
