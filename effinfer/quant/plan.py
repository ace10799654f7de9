"""Bits per layer: least loss of quality within a budget of bytes or of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from effinfer.quant.calibrate import Batch, as_batches
from effinfer.quant.config import Bits, QuantConfig, format_of
from effinfer.quant.costs import (
    NANOSECOND,
    Times,
    byte_costs,
    measure_times,
    quantized_layers,
    round_to_nearest,
    time_costs,
)
from effinfer.quant.knapsack import choose
from effinfer.quant.layers import Layer
from effinfer.quant.metrics import Loss, LossIncrease, layer_scores, relative_error, sampled_rows

METRICS = ("loss", "lim", "zd", "ompq", "lrp")
Plan = dict[str, Bits]


def plan_bits(
    model: nn.Module,
    budget_bytes: int | None = None,
    *,
    budget_seconds: float | None = None,
    metric: str = "loss",
    calibration: Any = None,
    choices: Sequence[Bits] = (2, 3, 4, 8),
    config: QuantConfig | None = None,
    times: Times | None = None,
    loss: Loss | None = None,
    tokenizer: Any = None,
) -> Plan:
    """Bits for every layer that ``quantize_`` would quantize: least sensitivity within the budget.

    The layers' sensitivities add up, and their sum is minimised exactly, as a multiple-choice
    knapsack. The sensitivity of a layer at some bits, all rounded to nearest here:

    - "loss": calibration loss with that layer quantized alone, minus the loss of the float model,
      the mean over its rounding error and the negative of it (see ``LossIncrease``);
    - else ``score(layer) * |X (W - Q)^T|^2 / |X W^T|^2``, with X inputs from the calibration
      (without one, "zd" takes ``|W - Q|^2 / |W|^2``), and the score of
      - "lim": 1 + layer input modification, ``1 - cos(x, block(x))`` (arXiv 2406.17415),
      - "zd": 1 - the share of weights with z-score above 1 (same paper; needs no calibration),
      - "ompq": ``exp(-mean likeness)`` to other layers' outputs, by centred Grams (arXiv 2109.07865),
      - "lrp": the layer's share of propagated relevance, epsilon rule (arXiv 2401.11243).

    Args:
        model: in eval mode, float weights; not changed.
        budget_bytes: for the packed weights with scales, zeros and offsets of all these layers.
            ``packed_bytes(model, bits)`` says what a uniform number of bits takes.
        budget_seconds: instead, for one pass through all these layers, as ``times`` says.
        metric: as above. "loss" runs the calibration twice for each layer and choice.
        calibration: as for ``quantize_``: texts, or batches (mappings of the model's named
            arguments, tuples of its arguments, tensors).
        choices: bits to choose from: some of 8, 4, 3, 2, 1.58, 1, or names of formats.
        config: group size, symmetry, scale dtype and what to leave out; its own bits do not matter.
        times: measured seconds, from ``measure_times``; by default measured now for one row.
        loss: ``loss(output, args, kwargs)`` for "loss", where the default of ``LossIncrease`` does
            not do.
        tokenizer: for texts; by default the one in the model's folder.

    Returns:
        ``{layer name: bits}``, for ``QuantConfig(plan=...)``.

    Raises:
        ValueError: not exactly one budget, one that not even the cheapest choice of every layer
            keeps, an unknown metric, no calibration where the metric needs it, no layers, training
            mode.
    """
    if (budget_bytes is None) == (budget_seconds is None):
        raise ValueError("plan_bits: give either budget_bytes or budget_seconds")
    if metric not in METRICS:
        raise ValueError(f"plan_bits: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if model.training:
        raise ValueError("plan_bits: the model must be in eval mode; call model.eval()")
    config = config or QuantConfig()
    bits = list(dict.fromkeys(choices))
    if not bits:
        raise ValueError("plan_bits: choices must not be empty")
    if calibration is None and metric != "zd":
        raise ValueError(f"plan_bits: metric {metric!r} needs calibration batches")
    batches = [] if calibration is None else as_batches(model, calibration, tokenizer)
    layers = quantized_layers(model, config)
    if budget_bytes is not None:
        budget, costs = budget_bytes, byte_costs(layers, bits, config)
    else:
        assert budget_seconds is not None
        measured = measure_times(model, bits, config=config) if times is None else times
        budget, costs = math.floor(budget_seconds / NANOSECOND), time_costs(layers, bits, measured)
    least = sum(map(min, costs))
    if budget < least:
        raise ValueError(
            f"plan_bits: the budget must be at least {_amount(least, budget_bytes)}, the cheapest "
            f"choice for all {len(layers)} layers, got {_amount(budget, budget_bytes)}"
        )
    losses = _sensitivities(model, layers, bits, config, metric, batches, loss)
    chosen = choose(costs, losses, budget)
    return {name: bits[i] for name, i in zip(layers, chosen, strict=True)}


def _amount(cost: int, budget_bytes: int | None) -> str:
    return f"{cost} bytes" if budget_bytes is not None else f"{cost * NANOSECOND:.9f} seconds"


def _sensitivities(
    model: nn.Module,
    layers: Mapping[str, Layer],
    choices: Sequence[Bits],
    config: QuantConfig,
    metric: str,
    batches: Sequence[Batch],
    loss: Loss | None,
) -> list[list[float]]:
    names = list(layers)
    if metric == "loss":
        increase = LossIncrease(model, batches, loss)
    else:
        scores = layer_scores(metric, model, names, batches)
        inputs = sampled_rows(model, names, batches) if batches else {}
    table = []
    from rich.progress import track  # not at import: effinfer comes without it

    for name in track(names, description="measuring layers", transient=True):
        weight = layers[name].weight
        row = []
        for bits in choices:
            quantized = round_to_nearest(weight, format_of(bits), config).dequantize()
            if metric == "loss":
                row.append(increase.with_weight(layers[name], quantized))
            else:
                row.append(scores[name] * relative_error(weight, quantized, inputs.get(name)))
        table.append(row)
    return table
