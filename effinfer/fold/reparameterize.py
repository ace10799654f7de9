"""Norms reparameterized so that one scale fits all their channels (RepQ-ViT, RepQuant)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from effinfer.fold.modules import Transaction, bias_of, is_norm, linear_weight
from effinfer.fold.pairs import Pair, divide, find_pairs, usable
from effinfer.fold.report import Folded, FoldReport, Refused
from effinfer.fold.scale import check_eval, input_ranges


def reparameterize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    bits: int = 8,
    symmetric: bool = False,
    pairs: Sequence[Pair] | None = None,
) -> FoldReport:
    """Scale (and shift) norms so that a per-tensor quantizer of their output loses no more than a
    per-channel one did (arXiv 2212.08254 and 2402.05628).

    Per channel c of the output y the calibration gives a quantizer ``round(y / s_c) + z_c``, for the
    whole tensor ``s = mean s_c`` and ``z = round(mean z_c)``. With ``r_c = s_c / s`` and
    ``b_c = s (z - z_c)`` the norm gets ``weight / r`` and ``bias / r - b``, the linears that read it
    ``W' = W diag(r)`` and ``bias + W' b``: the function is the same, and ``round(y' / s) + z`` are the
    codes the per-channel quantizer gave. z is an integer here (the published code leaves it
    fractional), so integer kernels take it as it is.

    Args:
        model: in eval mode; changed in place, all norms or, if anything raises, none.
        calibration: batches: mappings (keywords), tuples (arguments) or tensors.
        bits: of the quantizer, 2 to 8.
        symmetric: ``s_c = max|y_c| / (2^(bits - 1) - 1)`` and no zeros; all that an RMSNorm, which has
            no bias, and linears without bias can take.
        pairs: norms and their readers; by default those of common families that the model has.

    Returns:
        What was folded, with the scale and zero of each norm's output, and what was refused and why.

    Raises:
        ValueError: bits out of range, no batch, a model in training mode.
    """
    check_eval(model)
    if not 2 <= bits <= 8:
        raise ValueError(f"reparameterize: bits must be from 2 to 8, got {bits}")
    batches = list(calibration)
    if not batches:
        raise ValueError("reparameterize: calibration must have at least one batch")
    if pairs is None:
        pairs = [p for p in find_pairs(model) if is_norm(model.get_submodule(p.source))]
    checked = [
        (pair, reasons + tuple(_norm_reasons(model, pair, symmetric)))
        for pair, reasons in usable(model, pairs, batches[0])
    ]
    ranges = input_ranges(model, [pair for pair, reasons in checked if not reasons], batches)
    report = FoldReport("reparameterize")
    with Transaction() as transaction:
        for pair, reasons in checked:
            if reasons:
                report.refused.append(Refused(pair.source, pair.targets, reasons))
                continue
            scales, zeros = _quantizers(*ranges[pair], bits, symmetric)
            scale, zero = scales.mean(), zeros.mean().round()
            for parameter, value in divide(model, pair, scales / scale):
                transaction.set(parameter, value)
            if not symmetric:
                _shift(model, pair, scale * (zero - zeros), transaction)
            report.folded.append(Folded(pair.source, pair.targets, float(scale), int(zero)))
    return report


def _norm_reasons(model: nn.Module, pair: Pair, symmetric: bool) -> list[str]:
    source = model.get_submodule(pair.source)
    if not is_norm(source):
        return [f"{pair.source} ({type(source).__name__}) is not a norm"]
    if symmetric:
        return []
    return [
        f"{name} has no bias to take the shift; only symmetric=True is exact"
        for name in (pair.source, *pair.targets)
        if bias_of(model.get_submodule(name)) is None
    ]


def _quantizers(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and integer zero of each channel; a channel that never moves takes the mean scale."""
    if symmetric:
        scales = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scales = (high - low) / (2**bits - 1)
    moving = scales > 0
    usual = scales[moving].mean() if bool(moving.any()) else torch.ones_like(scales[0])
    scales = torch.where(moving, scales, usual)
    return scales, torch.zeros_like(scales) if symmetric else (-low / scales).round()


def _shift(model: nn.Module, pair: Pair, shift: torch.Tensor, transaction: Transaction) -> None:
    """Take ``shift`` off the (already scaled) norm's output and have the linears add it again."""
    source_bias = model.get_submodule(pair.source).get_parameter("bias")
    transaction.set(source_bias, source_bias.detach().double() - shift)
    for name in pair.targets:
        target = model.get_submodule(name)
        bias = target.get_parameter("bias")
        weight = linear_weight(target).detach().double()
        transaction.set(bias, bias.detach().double() + weight @ shift)
