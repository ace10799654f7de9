"""What a layer costs at some bits: bytes when packed, or seconds measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from effinfer.ops.lowbit_linear import lowbit_linear, pack_lowbit
from effinfer.ops.lowbit_weight import FORMATS, PANEL, LowBitWeight, groups
from effinfer.quant.config import Bits, QuantConfig, format_of
from effinfer.quant.grid import is_symmetric
from effinfer.quant.layers import Layer, find_layers
from effinfer.quant.rtn import rtn

Times = Mapping[tuple[int, int, Bits], float]  # seconds by (out_features, in_features, bits)

COLD_BYTES = (
    64 << 20
)  # weights a timing walks through, so that none is in cache when its turn comes
NANOSECOND = 1e-9  # the unit that times are counted in


def quantized_layers(model: nn.Module, config: QuantConfig) -> dict[str, Layer]:
    """The layers that ``quantize_`` would quantize, by name."""
    layers, _ = find_layers(model, replace(config, plan={}))
    if not layers:
        raise ValueError(f"plan_bits: {type(model).__name__} has no layer to quantize")
    return {layer.name: layer for layer in layers}


def packed_bytes(model: nn.Module, bits: Bits, config: QuantConfig | None = None) -> int:
    """What all layers that ``quantize_`` would quantize take at ``bits``, packed, with scales."""
    config = config or QuantConfig()
    return sum(cost for (cost,) in byte_costs(quantized_layers(model, config), [bits], config))


def byte_costs(
    layers: Mapping[str, Layer], choices: Sequence[Bits], config: QuantConfig
) -> list[list[int]]:
    """Bytes of each layer at each choice, exactly as ``pack_lowbit`` lays it out."""
    shapes = [layer.weight.shape for layer in layers.values()]
    return [[_bytes(n, k, format_of(bits), config) for bits in choices] for n, k in shapes]


def time_costs(
    layers: Mapping[str, Layer], choices: Sequence[Bits], times: Times
) -> list[list[int]]:
    """In whole nanoseconds, rounded up: a plan never takes longer than its budget."""
    costs = []
    for layer in layers.values():
        keys = [(*layer.weight.shape, bits) for bits in choices]
        missing = [key for key in keys if key not in times]
        if missing:
            raise ValueError(f"plan_bits: times has no {missing[0]} (outputs, inputs, bits)")
        costs.append([math.ceil(times[key] / NANOSECOND) for key in keys])
    return costs


def measure_times(
    model: nn.Module,
    choices: Sequence[Bits] = (2, 3, 4, 8),
    *,
    config: QuantConfig | None = None,
    rows: int = 1,
    seconds: float = 0.05,
) -> dict[tuple[int, int, Bits], float]:
    """Median seconds of ``lowbit_linear`` on this machine, per shape of a layer and bits.

    Weights come from memory, as they do when a model's layers take turns: several copies of each,
    64 MB together, are walked through.

    Args:
        model: whose layers' shapes are measured.
        choices: as for :func:`plan_bits`.
        config: group size, symmetry, scale dtype and activations.
        rows: of the input: 1 for decoding, more for prefill.
        seconds: to spend on each shape and choice.
    """
    config = config or QuantConfig()
    shapes = {tuple(layer.weight.shape) for layer in quantized_layers(model, config).values()}
    return {
        (n, k, bits): _measure(n, k, bits, config, rows, seconds)
        for n, k in sorted(shapes)
        for bits in choices
    }


def _measure(n: int, k: int, bits: Bits, config: QuantConfig, rows: int, seconds: float) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    quantized = round_to_nearest(weight, format_of(bits), config)
    copies = min(max(1, COLD_BYTES // max(_bytes(n, k, format_of(bits), config), 1)), 64)
    packed = [pack_lowbit(quantized) for _ in range(copies)]
    x = torch.randn(rows, k, generator=generator)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while len(taken) < 2 * copies or time.perf_counter() < end:
            start = time.perf_counter()
            lowbit_linear(x, packed[len(taken) % copies], activations=config.activations)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[copies:])


def round_to_nearest(weight: torch.Tensor, format: str, config: QuantConfig) -> LowBitWeight:
    """``rtn`` as ``config`` says."""
    return rtn(
        weight,
        format=format,
        group_size=config.columns_per_scale(format, weight.shape[1]),
        symmetric=_symmetric(format, config),
        scale_dtype=config.torch_scale_dtype,
    )


def _symmetric(format: str, config: QuantConfig) -> bool:
    return format.startswith("ternary") or is_symmetric(format, config.symmetric)


def _bytes(n: int, k: int, format: str, config: QuantConfig) -> int:
    """Of a layer's ``PackedLowBit``."""
    layout = FORMATS[format]
    panels = -(-n // PANEL)
    scales = panels * PANEL * groups(k, config.columns_per_scale(format, k))
    size = (
        panels * -(-k // layout.unit) * layout.unit_bytes
        + scales * config.torch_scale_dtype.itemsize
    )
    if not _symmetric(format, config):  # a zero in codes, or an offset like the scale
        size += scales * (config.torch_scale_dtype.itemsize if format == "binary" else 1)
    return size
