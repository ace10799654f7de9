"""Linears as the runners call them: packed once, several side by side as one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import nn

from effinfer.engine.released import ReleasedWeights
from effinfer.nn.linear import PackedLinear
from effinfer.nn.lowbit import LowBitLinear
from effinfer.ops.linear import pack_linear, unpack_linear
from effinfer.ops.lowbit_linear import PackedLowBit, pack_lowbit, unpack_lowbit
from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.patch.linear import LinearWithPacked, end_to_end
from effinfer.patch.lowbit import LinearWithLowBit

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Projection(Protocol):
    """``out = f(x W^T + bias) + residual`` on rows, into memory the caller gives."""

    out_features: int

    def __call__(
        self,
        native: Any,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Multiply ``x`` (rows, K) into ``out`` (rows, N)."""


class FloatProjection:
    """On a packed float weight."""

    def __init__(
        self,
        packed: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None,
        epilogue: str = "none",
    ) -> None:
        self.packed, self.out_features = packed, out_features
        self.bias, self.epilogue = bias, epilogue

    def __call__(
        self,
        native: Any,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        native.linear(x, self.packed, self.out_features, self.bias, self.epilogue, residual, out)

    def weights(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the weights as they were, a gate's before those it gates."""
        gated = self.epilogue.endswith("_mul")
        plain = unpack_linear(self.packed, self.out_features, gated=gated)
        return torch.cat(plain)[start:stop].clone()


class LowBitProjection:
    """On a packed low-bit weight."""

    def __init__(
        self, weight: PackedLowBit, bias: torch.Tensor | None, int8: bool, epilogue: str = "none"
    ) -> None:
        self.weight, self.out_features, self.bias = weight, weight.out_features, bias
        self.int8, self.epilogue = int8, epilogue

    def __call__(
        self,
        native: Any,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        w = self.weight
        if w.order is not None:
            x = x.index_select(1, w.order)
        native.lowbit_linear(
            x, w.packed, w.scale, w.zero, w.offset, self.bias, residual, None, None, w.format,
            w.out_features, w.in_features, w.group_size, self.int8, self.epilogue, 0, 0, out,
        )  # fmt: skip


class SideBySide:
    """Projections of one input that cannot be one product, each into its own columns."""

    def __init__(self, parts: Sequence[Projection]) -> None:
        self.parts = parts
        self.out_features = sum(part.out_features for part in parts)

    def __call__(
        self,
        native: Any,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        sizes = [part.out_features for part in self.parts]
        outs = torch.split(out, sizes, 1)
        residuals = [None] * len(sizes) if residual is None else torch.split(residual, sizes, 1)
        for part, columns, added in zip(self.parts, outs, residuals, strict=True):
            part(native, x, columns, added)


class GateTimesUp:
    """``silu(gate) * up`` of two projections that cannot be one product; no residual."""

    def __init__(self, gate: Projection, up: Projection) -> None:
        self.gate, self.up, self.out_features = gate, up, up.out_features
        self.parts = (gate, up)

    def __call__(
        self,
        native: Any,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        up = torch.empty_like(out)
        self.gate(native, x, out)
        self.up(native, x, up)
        out.mul_(up)


def lay_end_to_end(projections: Iterable[Projection]) -> None:
    """Move the packed float weights into one block of huge pages, those packed elsewhere too: the
    memory of a launch is then read in one sweep."""
    floats = [p for p in projections if isinstance(p, FloatProjection)]
    for projection, place in zip(floats, end_to_end([p.packed for p in floats]), strict=True):
        projection.packed = place


def release_weights(
    projection: Projection, linears: Sequence[Any], released: ReleasedWeights
) -> None:
    """Let go of the float weights of the linears that ``projection`` was made of."""
    if isinstance(projection, FloatProjection):
        ends = list(accumulate(linear.out_features for linear in linears))
        for linear, start, stop in zip(linears, [0, *ends], ends, strict=False):
            if linear._parameters.get("weight") is not None:
                released.release(linear, "weight", partial(projection.weights, start, stop))
    elif isinstance(projection, (SideBySide, GateTimesUp)):
        for part, linear in zip(projection.parts, linears, strict=True):
            release_weights(part, [linear], released)


def linear_reasons(linear: nn.Module) -> list[str]:
    """Why ``project`` cannot take this linear."""
    if isinstance(linear, (LowBitLinear, LinearWithLowBit)):
        return []
    if type(linear) is PackedLinear:
        return [] if linear.epilogue == "none" else [f"its epilogue is {linear.epilogue}"]
    if type(linear) is not nn.Linear and not isinstance(linear, LinearWithPacked):
        return [f"{type(linear).__name__} is not a linear effinfer can pack"]
    dtype = linear.weight.dtype
    return [] if dtype in _FLOATS else [f"its weight is {dtype}"]


def project(*linears: nn.Module) -> Projection:
    """The linears' outputs side by side, by one product where their weights are of one kind."""
    lowbit = [_lowbit(linear) for linear in linears]
    if len(linears) == 1:
        return _single(linears[0])
    if None not in lowbit:
        weights = [_numbers(w) for w in cast("list[PackedLowBit]", lowbit)]
        if _alike(weights, linears):
            packed = pack_lowbit(_stacked(weights))
            return LowBitProjection(packed, _biases(linears), _int8(linears[0]))
    elif all(w is None for w in lowbit) and len({_weight(m).dtype for m in linears}) == 1:
        weight = torch.cat([_weight(linear) for linear in linears])
        return FloatProjection(pack_linear(weight), weight.shape[0], _biases(linears))
    return SideBySide([_single(linear) for linear in linears])


def project_gated(gate: nn.Module, up: nn.Module) -> Projection:
    """``silu(gate(x)) * up(x)``, by one product where the weights are of one kind."""
    pair = (gate, up)
    bias = _biases(pair)
    bias = None if bias is None else bias.view(2, -1)
    lowbit = [_lowbit(linear) for linear in pair]
    if None not in lowbit:
        weights = [_numbers(w) for w in cast("list[PackedLowBit]", lowbit)]
        if _alike(weights, pair):
            packed = pack_lowbit(weights[1], gate_weight=weights[0])
            return LowBitProjection(packed, bias, _int8(gate), "silu_mul")
    elif all(w is None for w in lowbit) and _weight(gate).dtype == _weight(up).dtype:
        panels = pack_linear(_weight(up), gate_weight=_weight(gate))
        return FloatProjection(panels, _weight(up).shape[0], bias, "silu_mul")
    first: Any = _single(gate)
    first.epilogue = "silu"
    return GateTimesUp(first, _single(up))


def _single(linear: nn.Module) -> FloatProjection | LowBitProjection:
    """One linear; its packed weight itself where it has one."""
    packed = _lowbit(linear)
    bias = _biases((linear,))
    if packed is not None:
        return LowBitProjection(packed, bias, _int8(linear))
    if isinstance(linear, LinearWithPacked):
        return FloatProjection(linear.packed(), linear.out_features, bias)
    if isinstance(linear, PackedLinear):
        return FloatProjection(linear.packed, linear.out_features, bias)
    weight = _weight(linear)
    return FloatProjection(pack_linear(weight), weight.shape[0], bias)


def _weight(linear: Any) -> torch.Tensor:
    return cast(torch.Tensor, linear.weight.detach())


def _lowbit(linear: nn.Module) -> PackedLowBit | None:
    if isinstance(linear, (LowBitLinear, LinearWithLowBit)):
        return linear.packed_weight()
    return None


def _int8(linear: Any) -> bool:
    return bool(linear.activations == "int8")


def _numbers(packed: PackedLowBit) -> LowBitWeight:
    return unpack_lowbit(packed)[0]


def _biases(linears: Sequence[Any]) -> torch.Tensor | None:
    """The biases side by side in float32, zeros for a linear that has none beside one that has."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in linears
    ]
    return torch.cat(parts)


def _alike(weights: Sequence[LowBitWeight], linears: Sequence[nn.Module]) -> bool:
    """Whether the weights differ in outputs and numbers alone, and their inputs are taken alike."""
    first = weights[0]

    def same(w: LowBitWeight) -> bool:
        return (
            (w.format, w.codes.shape[1], w.group_size, w.scale.dtype)
            == (first.format, first.codes.shape[1], first.group_size, first.scale.dtype)
            and (w.zero is None) == (first.zero is None)
            and (w.offset is None) == (first.offset is None)
            and _equal(w.order, first.order)
        )

    return all(map(same, weights)) and len({_int8(linear) for linear in linears}) == 1


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _stacked(weights: Sequence[LowBitWeight]) -> LowBitWeight:
    rows: dict[str, Any] = {}
    for field in fields(LowBitWeight):
        parts = [getattr(w, field.name) for w in weights]
        if field.name != "order" and isinstance(parts[0], torch.Tensor):
            rows[field.name] = torch.cat(parts)
    return replace(weights[0], **rows)
