"""Layer-wise relevance propagation through any model, by rules for its linears, norms and
activations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from effinfer.fold.modules import is_linear, tensors
from effinfer.quant.calibrate import Batch

_EPSILON = 1e-3  # of the mean size of a layer's outputs

# Relevance R of a value x is carried as its gradient g with R = x * g, so that plain autograd sums
# it where paths join and splits it where they part; only the rules below change gradients.


class _EpsilonRule(torch.autograd.Function):
    """At a linear's output z: g becomes g z / (z + epsilon sign z), so that its inputs share
    R z / (z + epsilon sign z) by what each contributed; the rest, and the bias's share, is lost."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        size = z.abs()
        ctx.save_for_backward(size / (size + _EPSILON * size.mean()).clamp_min(1e-30))
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * cast(torch.Tensor, ctx.saved_tensors[0])


class _IdentityRule(torch.autograd.Function):
    """Across y = f(x), channel by channel: all relevance of y goes to x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        floor = 1e-6 * x.abs().mean() + 1e-30
        ctx.save_for_backward(y / torch.where(x < 0, x - floor, x + floor))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * cast(torch.Tensor, ctx.saved_tensors[0]), None


def relevance(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """The share of relevance that passes through the outputs of each layer that is called: sum of
    ``|R|`` over them and over the batches, all layers together 1 (LRP-QViT, arXiv 2401.11243).

    Relevance starts at the outputs as they are (``R = y^2``; for logits, at the best one of each
    row). Linears follow the epsilon rule, norms and activations pass it on unchanged, everything
    else (products of attention, scans, gates) goes by its local linearization.
    """
    total: dict[str, float] = {}
    for args, kwargs in batches:
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with ExitStack() as hooks, torch.enable_grad():
            for name, module in model.named_modules():
                hook = _rule(name, module, outputs)
                if hook is not None:
                    hooks.callback(module.register_forward_hook(hook).remove)
            result = model(*args, **kwargs)
            start = _start(result)
        kept = [(name, z) for name, each in outputs.items() for z in each]
        gradients = torch.autograd.grad(start, [z for _, z in kept], allow_unused=True)
        for (name, z), gradient in zip(kept, gradients, strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0.0) + float(
                    (z.detach() * gradient).abs().double().sum()
                )
    whole = sum(total.values())
    return {name: value / whole if whole > 0 else 1 / len(total) for name, value in total.items()}


def _start(result: Any) -> torch.Tensor:
    """What is differentiated: its gradient times an output is the output's relevance."""
    logits = getattr(result, "logits", None)
    if logits is not None:
        best: torch.Tensor = logits.amax(-1)
        return best.sum()
    return tensors(result)[0].square().sum() / 2


def _rule(name: str, module: nn.Module, outputs: dict[str, list[torch.Tensor]]) -> Any:
    """The forward hook that gives a module its rule, or None."""

    def linear(_: nn.Module, args: Any, z: torch.Tensor) -> torch.Tensor:
        if not z.requires_grad:  # below the first linear there is nothing to know
            z = z.detach().requires_grad_()
        kept = z.view_as(z)
        if name in outputs:
            outputs[name].append(kept)
        return cast(torch.Tensor, _EpsilonRule.apply(kept))  # type: ignore[no-untyped-call]

    def passing(_: nn.Module, args: Any, y: Any) -> Any:
        if len(args) != 1 or not isinstance(y, torch.Tensor) or args[0].shape != y.shape:
            return None
        if not args[0].requires_grad:
            return None
        return _IdentityRule.apply(args[0], y.detach())  # type: ignore[no-untyped-call]

    if name in outputs or is_linear(module):
        return linear
    home = type(module).__module__
    is_activation = home in ("torch.nn.modules.activation", "transformers.activations")
    is_softmax = "Softmax" in type(module).__name__
    if "Norm" in type(module).__name__ or (is_activation and not is_softmax):
        return passing
    return None
