"""``quantize_``: a model's linear layers become low-bit ones, in place, all or none."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from effinfer.nn.lowbit import LowBitLinear
from effinfer.nn.size import model_bytes
from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.calibrate import InputStatistics, as_batches, collect, in_groups
from effinfer.quant.config import QuantConfig
from effinfer.quant.gptq import gptq
from effinfer.quant.layers import Layer, check_model, find_layers, linear_weight, parents
from effinfer.quant.quantease import (
    SWEEPS,
    SWEEPS_AFTER_GPTQ,
    gptq_then_quantease,
    output_error,
    quantease,
)
from effinfer.quant.report import QuantizedLayer, QuantReport
from effinfer.quant.rtn import rtn

_STATISTICS_BYTES = 1 << 30  # of X^T X kept at once: more layers take more passes over the data
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def quantize_(
    model: nn.Module,
    config: QuantConfig,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> QuantReport:
    """Replace the linear layers of ``model`` by low-bit ones, in place.

    ``nn.Linear`` and transformers' ``Conv1D`` are replaced wherever they stand; a layer with two
    parents is quantized once and stays shared. A layer whose weight is tied to something else (a
    head to its embedding) stays in float, and the report says so. Nothing in the model changes
    until every layer is done, so after an error it is as it was.

    Args:
        model: in eval mode, weights loaded, not patched.
        config: what to quantize and how.
        calibration: texts, or batches the model is called with: tensors, tuples of arguments or
            mappings of named ones. Needed by all methods but "rtn", which weighs columns by it. A
            layer that no input reaches is rounded to the nearest, and reported so.
        tokenizer: for texts; by default the one in the model's folder.
        progress: whether to draw a progress bar on stderr.

    Raises:
        PatchConflictError: quantized or patched already.
        UnsupportedModelError: training mode, weights on meta.
        ValueError, TypeError: no calibration where the method needs it, weights or inputs with NaN
            or infinity, a group size that a format does not take, a plan with unknown names.
    """
    check_model(model)
    before = model_bytes(model)
    for layer in find_layers(model, config)[0]:
        list(parents(model, layer.names))  # before the work: a model that is a linear is refused
    quantized, report = quantize_layers(
        model, config, calibration, tokenizer=tokenizer, progress=progress
    )
    places = [(layer, list(parents(model, layer.names))) for layer in quantized]
    for layer, holders in places:
        for parent, name in holders:
            setattr(parent, name, quantized[layer])
    report.bytes_before, report.bytes_after = before, model_bytes(model)
    if "transformers" in sys.modules:
        from effinfer.quant.hf import mark_quantized

        described = {
            name: made.describe() for layer, made in quantized.items() for name in layer.names
        }
        mark_quantized(model, dataclasses.replace(config, layers=described))
    return report


def quantize_layers(
    model: nn.Module,
    config: QuantConfig,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> tuple[dict[Layer, LowBitLinear], QuantReport]:
    """What :func:`quantize_` puts in place of each layer; the model stays as it is."""
    layers, skipped = find_layers(model, config)
    report = QuantReport(type(model).__name__, skipped=skipped)
    if config.needs_calibration and calibration is None:
        raise ValueError(
            f"quantize_: method {config.method!r} needs calibration: texts, or batches to call the "
            "model with"
        )
    batches = [] if calibration is None else as_batches(model, calibration, tokenizer)
    by_name = {layer.name: layer for layer in layers}
    sizes = {name: layer.weight.shape[1] ** 2 * 4 for name, layer in by_name.items()}
    runs = in_groups(sizes, _STATISTICS_BYTES) if batches else [list(by_name)]
    made: dict[Layer, LowBitLinear] = {}
    steps = len(layers) + len(runs) * len(batches)
    with _bar(progress, steps) as advance:
        for run in runs:
            seen: dict[str, InputStatistics] = {}
            if batches:
                modules = {name: by_name[name].module for name in run}
                seen = collect(model, modules, batches, lambda: advance("calibrating"))
            for name in run:
                statistics = seen.pop(name, None)
                hessian = None if statistics is None else statistics.hessian
                layer = by_name[name]
                try:
                    made[layer], entry = _quantize_one(layer, config, hessian)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"quantize_: layer {name}: {error}") from error
                report.layers.append(entry)
                advance(name)
    return made, report


def quantize_linear(
    layer: nn.Module,
    config: QuantConfig,
    hessian: torch.Tensor | None = None,
    *,
    format: str | None = None,
) -> LowBitLinear:
    """A low-bit layer from an ``nn.Linear`` or ``Conv1D``, which stays as it is.

    Args:
        layer: the float layer.
        config: how; its ``exclude``, ``plan`` and ``quantize_head`` are not looked at.
        hessian: ``X^T X`` ``(K, K)`` of the layer's inputs; None rounds to the nearest.
        format: instead of that of ``config.bits``.
    """
    from effinfer.quant.config import format_of

    weight = quantize_weight(
        linear_weight(layer), config, hessian, format or format_of(config.bits)
    )
    bias: Any = layer.bias
    made = LowBitLinear.from_weight(weight, bias, activations=config.activations)
    return made.eval()


def quantize_weight(
    weight: torch.Tensor, config: QuantConfig, hessian: torch.Tensor | None, format: str
) -> LowBitWeight:
    """``weight`` ``(N, K)`` by the method of ``config``; to the nearest without a ``hessian``."""
    options: dict[str, Any] = {
        "format": format,
        "group_size": config.columns_per_scale(format, weight.shape[1]),
        "symmetric": None if format.startswith("ternary") else config.symmetric,
        "scale_dtype": config.torch_scale_dtype,
    }
    with torch.inference_mode(False), torch.no_grad():
        if hessian is None or config.method == "rtn":
            return rtn(weight, hessian, **options)
        if config.method == "gptq":
            return gptq(weight, hessian, damping=config.damping, **options)
        if config.method == "quantease":
            return quantease(weight, hessian, sweeps=config.sweeps or SWEEPS, **options)
        sweeps = config.sweeps or SWEEPS_AFTER_GPTQ
        return gptq_then_quantease(
            weight, hessian, damping=config.damping, sweeps=sweeps, **options
        )


def _quantize_one(
    layer: Layer, config: QuantConfig, hessian: torch.Tensor | None
) -> tuple[LowBitLinear, QuantizedLayer]:
    made = quantize_linear(layer.module, config, hessian, format=layer.format)
    for name in _HOOKS:  # the very dictionaries, so that handles still remove what they added
        setattr(made, name, getattr(layer.module, name))
    weight = layer.weight.float()
    off, method = made.lowbit_weight().dequantize(), config.method
    if hessian is not None:
        error = output_error(weight, off, hessian)
    else:
        size = weight.norm().item()
        error = (off - weight).norm().item() / size if size else 0.0
        method = "rtn" if method == "rtn" else "rtn, no input reached it"
    before = sum(p.nbytes for p in layer.module.parameters())
    after = sum(b.nbytes for name, b in made.named_buffers() if name != "description")
    bias = 0 if made.bias is None else made.bias.nbytes
    return made, QuantizedLayer(
        layer.name,
        layer.format,
        (after - bias) * 8 / max(weight.numel(), 1),
        method,
        error,
        "weight" if hessian is None else "output",
        before,
        after,
    )


@contextlib.contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of ``steps``; gives what moves it on by one and says at what it is."""
    if not show:
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("quantizing", total=steps)
        yield lambda label: bar.update(task, advance=1, description=label)
