"""Linear layers on weights of 8 bits down to 1: ``epilogue(x W^T + bias) + residual``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F

from effinfer._native import native
from effinfer.ops._register import Op, contiguous_rows, dense_float32, inference_only, public
from effinfer.ops.linear import EPILOGUES
from effinfer.ops.lowbit_pack import (
    new_packed,
    pack_codes,
    pack_groups,
    unpack_codes,
    unpack_groups,
)
from effinfer.ops.lowbit_weight import FORMATS, PANEL, LowBitWeight, groups

ACTIVATIONS = ("int8", "f32")
Requantize = tuple[torch.Tensor, int, int]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedLowBit:
    """A low-bit weight as the kernels read it: plain tensors, saved and moved like any.

    Made by :func:`pack_lowbit`. With a gate, its panels and the weight's take turns.

    Attributes:
        format, out_features, in_features, group_size: as in ``LowBitWeight``.
        packed: ``(panels, units, unit_bytes)`` uint8.
        scale: ``(panels, G, 16)`` float16, bfloat16 or float32.
        zero: ``(panels, G, 16)`` uint8, or None.
        offset: ``(panels, G, 16)`` in ``scale``'s dtype, or None.
        order: ``(K,)`` int64 or None: ``x[..., order]`` is what the columns multiply.
    """

    format: str
    out_features: int
    in_features: int
    group_size: int
    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether it holds a gate too, for the ``*_mul`` epilogues."""
        return self.packed.shape[0] > -(-self.out_features // PANEL)

    def prefix(
        self, out_features: int | None = None, in_features: int | None = None
    ) -> PackedLowBit:
        """The first outputs and columns as views: ``out_features`` must be a multiple of 16 or all,
        ``in_features`` of the format's unit and of the group or all; no ``order``."""
        n = self.out_features if out_features is None else out_features
        k = self.in_features if in_features is None else in_features
        layout = FORMATS[self.format]
        whole_n, whole_k = n == self.out_features, k == self.in_features
        if not 0 <= n <= self.out_features or not (whole_n or n % PANEL == 0):
            raise ValueError(
                f"PackedLowBit.prefix: out_features must be {self.out_features} or a smaller "
                f"multiple of {PANEL}, got {n}"
            )
        group = self.group_size if self.group_size < self.in_features else 1
        if not 0 <= k <= self.in_features or not (whole_k or k % layout.unit == k % group == 0):
            raise ValueError(
                f"PackedLowBit.prefix: in_features must be {self.in_features} or a smaller "
                f"multiple of {layout.unit} and of the group size, got {k}"
            )
        if self.order is not None and not whole_k:
            raise ValueError("PackedLowBit.prefix: in_features cannot be cut after act-order")
        panels = -(-n // PANEL) * (2 if self.gated else 1)
        g = groups(k, self.group_size)
        zero, offset = (None if t is None else t[:panels, :g] for t in (self.zero, self.offset))
        return replace(
            self,
            out_features=n,
            in_features=k,
            packed=self.packed[:panels, : -(-k // layout.unit)],
            scale=self.scale[:panels, :g],
            zero=zero,
            offset=offset,
        )


def pack_lowbit(weight: LowBitWeight, *, gate_weight: LowBitWeight | None = None) -> PackedLowBit:
    """Pack a weight for :func:`lowbit_linear`: once, when a model is quantized or loaded.

    Args:
        weight: ``(N, K)`` of any format.
        gate_weight: another, equal in format, shape, group size, dtype, parts and ``order``, for
            the epilogues ``silu_mul`` and ``gelu_mul``, whose ``weight`` is the "up" projection.

    Returns:
        Tensors on ``weight``'s device; huge pages are asked for behind the codes. Nothing is lost:
        :func:`unpack_lowbit` gives the same weights back.

    Raises:
        ValueError: a gate that does not match.
    """
    parts = [weight] if gate_weight is None else [gate_weight, weight]
    if gate_weight is not None and _kind(gate_weight) != _kind(weight):
        raise ValueError(
            "pack_lowbit: gate_weight must match weight in format, shape, group size and parts: "
            f"expected {_kind(weight)}, got {_kind(gate_weight)}"
        )
    if gate_weight is not None and not _same_order(gate_weight.order, weight.order):
        raise ValueError("pack_lowbit: gate_weight must have the same order as weight")
    layout = FORMATS[weight.format]
    n, k = weight.codes.shape
    count, panels = len(parts), -(-n // PANEL)
    packed = new_packed(weight.codes, panels * count, -(-k // layout.unit), layout.unit_bytes)
    grouped: dict[str, torch.Tensor | None] = {}
    for name in ("scale", "zero", "offset"):
        like: torch.Tensor | None = getattr(weight, name)
        grouped[name] = (
            None if like is None else like.new_empty(panels * count, like.shape[1], PANEL)
        )
    for i, part in enumerate(parts):
        pack_codes(part.format, part.codes, packed[i::count])
        for name, out in grouped.items():
            if out is not None:
                pack_groups(getattr(part, name), out[i::count])
    return PackedLowBit(
        weight.format,
        n,
        k,
        weight.group_size,
        packed,
        cast(torch.Tensor, grouped["scale"]),
        grouped["zero"],
        grouped["offset"],
        weight.order,
    )


def unpack_lowbit(packed: PackedLowBit) -> tuple[LowBitWeight, ...]:
    """The weights :func:`pack_lowbit` was given: ``(weight,)``, or ``(gate_weight, weight)``."""
    return _unpack(
        packed.packed, packed.scale, packed.zero, packed.offset, packed.order, packed.format,
        packed.out_features, packed.in_features, packed.group_size, 2 if packed.gated else 1,
    )  # fmt: skip


def _unpack(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
    offset: torch.Tensor | None, order: torch.Tensor | None, format: str, n: int, k: int,
    group_size: int, count: int,
) -> tuple[LowBitWeight, ...]:  # fmt: skip
    def part(t: torch.Tensor | None, i: int) -> torch.Tensor | None:
        return None if t is None else unpack_groups(t[i::count], n)

    return tuple(
        LowBitWeight(
            format,
            unpack_codes(format, packed[i::count], n, k),
            unpack_groups(scale[i::count], n),
            group_size,
            part(zero, i),
            part(offset, i),
            order,
        )
        for i in range(count)
    )


def _kind(w: LowBitWeight) -> tuple[object, ...]:
    return (
        w.format, tuple(w.codes.shape), w.group_size, w.scale.dtype, w.codes.device,
        w.zero is not None, w.offset is not None,
    )  # fmt: skip


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``(rows, K)`` and float32 scales ``(rows,)`` of ``x`` (rows, K), as the kernels'.

    ``scale = absmax / 127``, ``code = rne(x * (127 / absmax))`` in float32. A row of zeros, or one
    whose ``127 / absmax`` overflows, has scale and codes 0; one with NaN or infinity scale NaN.
    """
    wide = x.float()
    absmax = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[0])
    largest = torch.full_like(
        absmax, 127
    )  # a tensor: torch divides by way of reciprocals of scalars
    inverse = largest / absmax
    usable = absmax.isfinite() & inverse.isfinite()
    inverse, codes = torch.where(usable, inverse, 0), torch.where(usable[:, None], wide, 0)
    scale = torch.where(usable, absmax / largest, torch.where(absmax.isfinite(), 0, torch.nan))
    return (codes * inverse[:, None]).round().to(torch.int8), scale


def _int8_sums(codes: torch.Tensor, weight: LowBitWeight, wide: torch.dtype) -> torch.Tensor:
    """t of the contract: integer sums per group, exact in float64, added up in ``wide``."""
    x, values = codes.double(), weight.values().double()
    t = x.new_zeros((x.shape[0], weight.out_features), dtype=wide)
    for g in range(weight.scale.shape[1]):
        columns = slice(g * weight.group_size, (g + 1) * weight.group_size)
        t = t + weight.scale[:, g].to(wide) * (x[:, columns] @ values[:, columns].t()).to(wide)
        if weight.offset is not None:
            t = t + weight.offset[:, g].to(wide) * x[:, columns].sum(-1, keepdim=True).to(wide)
    return t


def _reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
    offset: torch.Tensor | None, order: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, x_scale: torch.Tensor | None, multiplier: torch.Tensor | None,
    format: str, out_features: int, in_features: int, group_size: int, activations: str,
    epilogue: str, low: int, high: int,
) -> torch.Tensor:  # fmt: skip
    _check(x, format, activations, epilogue)
    if multiplier is not None and activations != "int8":
        raise ValueError(
            f"lowbit_linear: activations must be int8 with requantize, got {activations}"
        )
    wide = torch.promote_types(torch.float32 if x.dtype is torch.int8 else x.dtype, torch.float32)
    count = 2 if epilogue.endswith("_mul") else 1
    weights = _unpack(
        packed, scale, zero, offset, None, format, out_features, in_features, group_size, count
    )
    biases = [None] * len(weights) if bias is None else bias.to(wide).view(len(weights), -1)
    if order is not None:
        x = x.index_select(-1, order)
    rows = x.reshape(-1, in_features)
    if activations == "int8":
        codes, xs = (rows, x_scale) if x_scale is not None else quantize_rows(rows)
        sums = [xs.to(wide)[:, None] * _int8_sums(codes, w, wide) for w in weights]
    else:
        sums = [F.linear(rows.to(wide), w.dequantize(wide)) for w in weights]
    y, *up = (s if b is None else s + b for s, b in zip(sums, biases, strict=True))
    if epilogue.startswith("silu"):
        y = F.silu(y)
    elif epilogue.startswith("gelu"):
        y = F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    if up:
        y = y * up[0]
    y = y.view(*x.shape[:-1], out_features)
    if residual is not None:
        y = y + residual.to(wide)
    if multiplier is None:
        return y.to(wide if x.dtype is torch.int8 else x.dtype)
    return (y * multiplier.to(wide)).nan_to_num(low).clamp(low, high).round().to(torch.int8)


def _check(x: torch.Tensor, format: str, activations: str, epilogue: str) -> None:
    if format not in FORMATS:
        raise ValueError(
            f"lowbit_linear: format must be one of {', '.join(FORMATS)}, got {format!r}"
        )
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"lowbit_linear: activations must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activations!r}"
        )
    if epilogue not in EPILOGUES:
        raise ValueError(
            f"lowbit_linear: epilogue must be one of {', '.join(EPILOGUES)}, got {epilogue!r}"
        )


def _fake(x: torch.Tensor, multiplier: torch.Tensor | None, out_features: int) -> torch.Tensor:
    shape = (*x.shape[:-1], out_features)
    if multiplier is not None:
        return x.new_empty(shape, dtype=torch.int8)
    return x.new_empty(shape, dtype=torch.float32 if x.dtype is torch.int8 else x.dtype)


def _run(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
    offset: torch.Tensor | None, order: torch.Tensor | None, bias: torch.Tensor | None,
    residual: torch.Tensor | None, x_scale: torch.Tensor | None, multiplier: torch.Tensor | None,
    format: str, out_features: int, in_features: int, group_size: int, activations: str,
    epilogue: str, low: int, high: int,
) -> torch.Tensor:  # fmt: skip
    inference_only("lowbit_linear", x, bias, residual)
    _check(x, format, activations, epilogue)
    x = contiguous_rows(x) if order is None else x.index_select(-1, order)
    y = (
        x.new_empty(*x.shape[:-1], out_features)
        if x.dtype in _FLOATS and multiplier is None
        else _fake(x, multiplier, out_features)
    )
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(
                f"lowbit_linear: residual must have shape {tuple(y.shape)}, "
                f"got {tuple(residual.shape)}"
            )
        residual = contiguous_rows(residual)
    native(x).lowbit_linear(
        x, packed, scale, zero, offset, dense_float32(bias), residual, x_scale, multiplier, format,
        out_features, in_features, group_size, activations == "int8", epilogue, low, high, y,
    )  # fmt: skip
    return y


_OP = Op(
    "lowbit_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? offset, Tensor? order,"
    " Tensor? bias, Tensor? residual, Tensor? x_scale, Tensor? multiplier, str format,"
    " SymInt out_features, SymInt in_features, SymInt group_size, str activations, str epilogue,"
    " int low, int high) -> Tensor",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def lowbit_linear(
    x: torch.Tensor,
    weight: PackedLowBit,
    bias: torch.Tensor | None = None,
    *,
    activations: str = "int8",
    epilogue: str = "none",
    residual: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    requantize: Requantize | None = None,
) -> torch.Tensor:
    """``epilogue(x W^T + bias) + residual`` with ``W`` from :func:`pack_lowbit`.

    With float activations the result is, bit for bit, :func:`linear`'s on the dequantized float32
    weight (``x`` and the columns in packed order, where there is an ``order``). With int8
    activations each row of ``x`` becomes ``scale * codes``, ``scale = absmax / 127`` and codes
    rounded to nearest even; products are summed exactly, and groups in ascending order. Its bits
    depend on the row and the weights alone: not on the other rows, the strides, the threads, nor,
    for epilogue "none", on the instruction set.

    Args:
        x: ``(..., K)``, float32, bfloat16 or float16; any strides. Or int8 codes of -127 to 127
            with ``x_scale``.
        weight: for ``silu_mul`` and ``gelu_mul`` from ``pack_lowbit(up, gate_weight=gate)``.
        bias: ``(N,)``; ``(2, N)``, the gate's first, for the ``*_mul`` epilogues.
        activations: "int8", or "f32": as they are.
        epilogue: as for :func:`linear`.
        residual: ``(..., N)`` in the output's dtype (float32 for int8 codes), added last.
        x_scale: ``(rows,)`` float32, one for each row of int8 codes.
        requantize: ``(multiplier, low, high)``: return ``rne(y * multiplier[n])`` clamped to
            ``low .. high`` as int8, with ``multiplier`` ``(N,)`` float32 (``2.0 ** -shift`` shifts
            and rounds to even); NaN becomes ``low``. With int8 activations only.

    Returns:
        ``(..., N)`` in ``x``'s dtype, float32 for int8 codes, int8 with ``requantize``. A row with
        NaN or infinity gives NaN with int8 activations.

    Error bound: relative L2 against float64 on the same codes <= 1e-6 (float32), 4e-3 (bfloat16),
    5e-4 (float16). ``lowbit_linear.reference`` takes the torch op's arguments, tensors one by one.

    Raises:
        ValueError, TypeError: a shape, dtype, device, format or epilogue that does not fit, or a
            code of -128.
        RuntimeError: an input requires grad.
    """
    multiplier, low, high = (None, 0, 0) if requantize is None else requantize
    y = _OP(
        x, weight.packed, weight.scale, weight.zero, weight.offset, weight.order, bias, residual,
        x_scale, multiplier, weight.format, weight.out_features, weight.in_features,
        weight.group_size, activations, epilogue, low, high,
    )  # fmt: skip
    return cast(torch.Tensor, y)
