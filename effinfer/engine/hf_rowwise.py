"""What torch computes by the number of rows, computed so that a row's bits are its own: products with
weights that are no linears', in routers and in experts that run by the model's code, GELU, and the
sigmoid of a few numbers a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
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
    rows_apart: bool

    @staticmethod
    def of(weight: torch.Tensor, *, rows_apart: bool = False) -> RowwiseWeight:
        """From a plain one, whose memory it shares; ``rows_apart`` of its products, see ``_apart``."""
        made: RowwiseWeight = torch.Tensor._make_subclass(RowwiseWeight, weight.detach())
        made.rows_apart = rows_apart
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
    out = linear(x.contiguous(), weight.packed, len(weight), bias)
    return _apart(out) if weight.rows_apart else out


def _apart(x: torch.Tensor) -> torch.Tensor:
    """A copy whose rows do not touch: what torch computes of each number, it computes a row at a
    time, and not by where the number lies among all of them."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)[..., :-1]
    return wide.copy_(x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """As torch's own kernel gives it: a contiguous tensor, as a single row always is, goes to oneDNN."""
    rows = x.flatten(0, -2)
    apart = x.new_zeros(len(rows) + 1, rows.shape[1] + 1)[:, :-1]
    apart[:-1] = rows
    return F.gelu(apart)[:-1].view(x.shape)


def take_over_products(model: nn.Module, undo: ExitStack) -> None:
    """Put ``RowwiseWeight``s in the place of the float32 weights of routers and of experts that still
    have theirs, another GELU in that of torch's, and rows apart before the sigmoid that gates a
    shared expert. ``undo`` puts back what was there."""
    from transformers.activations import GELUActivation

    def replace(owner: dict[str, Any], name: str, value: Any) -> None:
        undo.callback(owner.__setitem__, name, owner[name])
        owner[name] = value

    for module in list(model.modules()):
        kind = type(module).__name__
        if kind.endswith(("Router", "Experts")):
            own: dict[str, Any] = module._parameters
            for name, weight in list(own.items()):
                if weight is not None and weight.dim() in (2, 3) and weight.dtype == torch.float32:
                    router = kind.endswith("Router")
                    replace(own, name, RowwiseWeight.of(weight, rows_apart=router))
        elif type(module) is GELUActivation and module.act is F.gelu:
            replace(module.__dict__, "act", _gelu)
        gate = module._modules.get("shared_expert_gate")
        if gate is not None:
            hook = gate.register_forward_hook(lambda _module, _inputs, output: _apart(output))
            undo.callback(hook.remove)
