"""What torch computes by the number of rows, computed so that a row's bits are its own: products with
weights that are no linears', in routers and experts, and GELU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from effinfer.ops.linear import linear, pack_linear


class RowwiseWeight(torch.Tensor):
    """A float32 weight ``(outputs, inputs)``, or one for each of some experts, as a model reads it;
    ``F.linear`` with it runs on a packed copy. Anything else is done with the weight itself."""

    packed: torch.Tensor
    experts: list[RowwiseWeight]

    @staticmethod
    def of(weight: torch.Tensor) -> RowwiseWeight:
        """From a plain one, whose memory it shares."""
        made: RowwiseWeight = torch.Tensor._make_subclass(RowwiseWeight, weight.detach())
        if weight.dim() == 3:
            made.experts = [RowwiseWeight.of(expert) for expert in weight.detach()]
        else:
            made.packed = pack_linear(weight.detach())
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The one function that is another's here, and the way to one expert's weight."""
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            return _multiply(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and hasattr(args[0], "experts"):
            return args[0].experts[int(args[1])]
        if func is torch.Tensor.type and args[1:] == (torch.float32,):
            return args[0]  # what it is
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _multiply(
    x: torch.Tensor, weight: RowwiseWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return linear(x.contiguous(), weight.packed, len(weight), bias)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """As torch's own kernel gives it: a contiguous tensor, as a single row always is, goes to oneDNN."""
    rows = x.flatten(0, -2)
    apart = x.new_zeros(len(rows) + 1, rows.shape[1] + 1)[:, :-1]
    apart[:-1] = rows
    return F.gelu(apart)[:-1].view(x.shape)


def take_over_products(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Put ``RowwiseWeight``s in the place of the float32 weights of routers and experts, and another
    GELU in that of torch's; what was there before, as (dictionary, name, value)."""
    from transformers.activations import GELUActivation

    before = []
    for module in model.modules():
        if not type(module).__name__.endswith(("Router", "Experts")):
            continue
        own: dict[str, Any] = module._parameters
        for name, weight in own.items():
            if weight is not None and weight.dim() in (2, 3) and weight.dtype == torch.float32:
                before.append((own, name, weight))
    for own, name, weight in before:
        own[name] = RowwiseWeight.of(weight)
    for module in model.modules():
        if type(module) is GELUActivation and module.act is F.gelu:
            before.append((module.__dict__, "act", F.gelu))
            module.__dict__["act"] = _gelu
    return before
