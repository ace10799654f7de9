"""What the quality measurements of both models share: one pass of statistics, many quantizations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from effinfer.quant import QuantConfig
from effinfer.quant.calibrate import collect
from effinfer.quant.layers import find_layers
from effinfer.quant.quantize import quantize_linear

METHODS = ("rtn", "gptq", "quantease", "gptq+cd")
BITS = (8, 4, 3, 2)


class Quantizer:
    """Quantizes copies of a model by any method, with statistics of its inputs taken once."""

    def __init__(self, model: nn.Module, config: QuantConfig, batches: Sequence[Any]) -> None:
        self.model, self.config = model, config
        layers, _ = find_layers(model, replace(config, plan={}))
        self.layers = {layer.name: layer.module for layer in layers}
        statistics = collect(model, self.layers, batches)
        self.hessians = {name: found.hessian for name, found in statistics.items()}

    def quantized(
        self, bits: int, method: str, plan: Mapping[str, Any] | None = None
    ) -> tuple[nn.Module, int]:
        """A quantized copy, and the bytes of its low-bit weights."""
        config = replace(self.config, bits=bits, method=method, plan=dict(plan or {}))
        model, size = copy.deepcopy(self.model), 0
        for name, layer in self.layers.items():
            made = quantize_linear(
                layer, config, self.hessians.get(name), format=config.format_for(name)
            )
            parts = (made.packed, made.scale, made.zero, made.offset, made.order)
            size += sum(part.nbytes for part in parts if part is not None)
            model.set_submodule(name, made)
        return model, size

    def with_float_activations(self, quantized: nn.Module) -> nn.Module:
        """The same weights in plain linears: what activations="f32" computes, by its contract."""
        model = copy.deepcopy(quantized)
        for name, layer in self.layers.items():
            plain = copy.deepcopy(layer)
            plain.weight = nn.Parameter(model.get_submodule(name).weight, requires_grad=False)
            model.set_submodule(name, plain)
        return model

    def float_bytes(self) -> int:
        """The same layers' weights in float32."""
        return sum(layer.weight.numel() * 4 for layer in self.layers.values())


def cases() -> Iterator[tuple[int, str]]:
    """Every number of bits with every method."""
    return ((bits, method) for bits in BITS for method in METHODS)
