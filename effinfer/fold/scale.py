"""Scales moved from where activations are made into the linears that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from effinfer.fold.modules import Transaction, channels, linear_weight, run, sample
from effinfer.fold.pairs import Pair, divide, find_pairs, usable
from effinfer.fold.report import Folded, FoldReport, Refused


def move_scale(
    model: nn.Module, pair: Pair, scale: torch.Tensor, *, batch: Any = None
) -> FoldReport:
    """Divide each channel of ``pair.source`` by ``scale`` and multiply the targets' columns by it.

    The model computes the same function; only rounding of the changed weights to their own type
    differs, and with powers of two not even that.

    Args:
        model: in eval mode; changed in place.
        pair: a norm or linear of it, and every linear that reads it.
        scale: ``(channels of the source,)``, positive and finite.
        batch: a forward's arguments to probe the pair with; transformers models need none.

    Raises:
        ValueError: bad arguments, or the fold would not be exact; the message lists the reasons.
    """
    check_eval(model)
    size = channels(model.get_submodule(pair.source))
    if scale.shape != (size,) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"move_scale: scale must be {size} positive finite numbers")
    ((_, reasons),) = usable(model, [pair], sample(model) if batch is None else batch)
    if reasons:
        raise ValueError(f"move_scale: {pair.source} cannot be scaled: {'; '.join(reasons)}")
    with Transaction() as transaction:
        for parameter, value in divide(model, pair, scale.to(device_of(model, pair))):
            transaction.set(parameter, value)
    return FoldReport("move_scale", [Folded(pair.source, pair.targets)])


def smooth(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    alpha: float = 0.5,
    power_of_two: bool = False,
    pairs: Sequence[Pair] | None = None,
) -> FoldReport:
    """SmoothQuant (arXiv 2211.10438): move the scale of outlying channels from activations into
    weights, so that int8 activations lose less.

    Per channel ``s = max|x|^alpha / max|w|^(1 - alpha)``, over the calibration's inputs of the
    targets and over the targets' columns; the source is divided by s, the columns multiplied.

    Args:
        model: in eval mode; changed in place, all pairs or, if anything raises, none.
        calibration: batches: mappings (keywords), tuples (arguments) or tensors.
        alpha: from 0 (weights stay level) to 1 (activations do).
        power_of_two: round s to one, and the model's outputs keep every bit.
        pairs: where to move scales; by default those of common families that the model has.

    Returns:
        What was folded, and which pairs were refused with every reason.

    Raises:
        ValueError: alpha out of range, no batch, a model in training mode.
    """
    check_eval(model)
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha must be from 0 to 1, got {alpha}")
    batches = list(calibration)
    if not batches:
        raise ValueError("smooth: calibration must have at least one batch")
    report = FoldReport("smooth")
    checked = usable(model, find_pairs(model) if pairs is None else pairs, batches[0])
    sound = [pair for pair, reasons in checked if not reasons]
    ranges = input_ranges(model, sound, batches)
    with Transaction() as transaction:
        for pair, reasons in checked:
            if reasons:
                report.refused.append(Refused(pair.source, pair.targets, reasons))
                continue
            low, high = ranges[pair]
            scale = _smoothing(model, pair, torch.maximum(-low, high), alpha)
            if power_of_two:
                scale = torch.exp2(scale.log2().round())
            for parameter, value in divide(model, pair, scale):
                transaction.set(parameter, value)
            report.folded.append(Folded(pair.source, pair.targets))
    return report


def _smoothing(model: nn.Module, pair: Pair, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """The scale of each channel; 1 where activations or weights are all zero."""
    columns = [linear_weight(model.get_submodule(name)) for name in pair.targets]
    weights = torch.stack([w.detach().double().abs().amax(0) for w in columns]).amax(0)
    activations, weights = pair.gather(largest), pair.gather(weights)
    scale = activations**alpha / weights ** (1 - alpha)
    return torch.where((activations > 0) & (weights > 0), scale, torch.ones_like(scale))


def device_of(model: nn.Module, pair: Pair) -> torch.device:
    """Where the pair's weights are."""
    return model.get_submodule(pair.source).get_parameter("weight").device


@torch.no_grad()
def input_ranges(
    model: nn.Module, pairs: Sequence[Pair], batches: Iterable[Any]
) -> dict[Pair, tuple[torch.Tensor, torch.Tensor]]:
    """Lowest and highest value (float64) of each input of each pair's targets over the batches.

    Raises:
        ValueError: NaN or infinity among them.
    """
    ranges: dict[Pair, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(pair: Pair, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        low, high = rows.amin(0), rows.amax(0)
        if pair in ranges:
            low, high = torch.minimum(low, ranges[pair][0]), torch.maximum(high, ranges[pair][1])
        ranges[pair] = low, high

    with ExitStack() as hooks:
        for pair in pairs:  # the targets of a pair read the same: the first stands for all
            target = model.get_submodule(pair.targets[0])
            hook = target.register_forward_pre_hook(lambda _, args, p=pair: watch(p, args[0]))
            hooks.callback(hook.remove)
        for batch in batches:
            run(model, batch)
    for pair, (low, high) in ranges.items():
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError(f"fold: inputs of {pair.targets[0]} must be finite")
    return ranges


def check_eval(model: nn.Module) -> None:
    if model.training:
        raise ValueError("fold: the model must be in eval mode; call model.eval()")
