"""What ``patch(quantize=)`` does to the linears of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from effinfer.nn.lowbit import PARTS, LowBitLinear
from effinfer.patch.lowbit import LinearWithLowBit
from effinfer.patch.plan import Choice, Plan
from effinfer.patch.report import Replaced
from effinfer.patch.rules import Rule
from effinfer.patch.swap import swap
from effinfer.quant.config import QuantConfig
from effinfer.quant.layers import check_model, find_layers
from effinfer.quant.quantize import quantize_layers


def choose_low_bit(
    model: nn.Module, config: QuantConfig, choice: Choice, plan: Plan
) -> QuantConfig:
    """Take the linears that both ``config`` and the caller's choice name over from ``plan``; gives
    ``config`` without the others."""
    check_model(model)
    rule = Rule("", LinearWithLowBit, "linear", "")
    refused = {
        layer.name
        for layer in find_layers(model, config)[0]
        if any(choice.refusals(name, layer.module, rule) for name in layer.names)
    }
    config = replace(config, exclude=(*config.exclude, *sorted(refused)))
    layers, left = find_layers(model, config)
    chosen = {layer.module for layer in layers}
    names = {name for layer in layers for name in layer.names}
    plan.swaps = [(module, rule) for module, rule in plan.swaps if module not in chosen]
    plan.replaced = [entry for entry in plan.replaced if entry.name not in names]
    plan.fallbacks = [entry for entry in plan.fallbacks if entry.name not in names]
    for layer in layers:
        why = f"{layer.format} weight, {config.activations} activations"
        label = type(layer.module).__name__
        plan.replaced.append(Replaced(layer.name, label, "LinearWithLowBit", "linear", why))
    why_float = {entry.name: entry.reason for entry in left if entry.name not in refused}
    plan.replaced = [
        replace(entry, why=f"{entry.why}; float, as {why_float[entry.name]}")
        if entry.name in why_float
        else entry
        for entry in plan.replaced
    ]
    return config


def quantized_copies(
    model: nn.Module, config: QuantConfig, calibration: Any
) -> dict[nn.Module, LowBitLinear]:
    """A low-bit copy of every layer ``config`` names; the model stays as it is."""
    made, _ = quantize_layers(model, config, calibration)
    return {layer.module: copy for layer, copy in made.items()}


def swap_low_bit(copies: dict[nn.Module, LowBitLinear], config: QuantConfig) -> None:
    """Swap the class of each layer and hand it its copy."""
    for module, made in copies.items():
        swap(module, LinearWithLowBit)
        held: Any = module
        held.hold(made, config)


def low_bit_bytes(copies: Iterable[LowBitLinear]) -> int:
    """Bytes of the copies, without biases, which are the parameters' own."""
    parts = (getattr(copy.packed_weight(), name) for copy in copies for name in PARTS)
    return sum(part.nbytes for part in parts if part is not None)
