"""Weights that exist once: parameters that give up their memory while a packed copy stands for them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from effinfer.nn.stamp import stamp
from effinfer.ops.linear import unpack_linear
from effinfer.patch.linear import LinearWithPacked


class ReleasedWeights:
    """Parameters without memory, and what makes their numbers again.

    A released parameter stays the object it was, with no elements: what reads it fails rather than
    read something else. ``state_dict()`` of its module gives the weight as ever. Whoever else holds
    its memory keeps it.

    Args:
        kept: addresses of weights that something else reads: they are not released.
    """

    def __init__(self, kept: Collection[int] = ()) -> None:
        self._kept = kept
        self._undo = ExitStack()

    def release(self, module: Any, name: str, unpack: Callable[[], torch.Tensor]) -> None:
        """Let go of a parameter's memory; ``unpack()`` must give its numbers, to the bit. Modules
        that share the parameter release it one by one."""
        parameter = module._parameters[name]
        assert parameter is not None
        if parameter.data_ptr() in self._kept:
            return

        def restore() -> None:
            with torch.inference_mode(False), torch.no_grad():
                if not parameter.numel():
                    parameter.data = unpack()

        def write(_: nn.Module, state: dict[str, Any], prefix: str, *_metadata: Any) -> None:
            state[prefix + name] = unpack()

        self._undo.callback(restore)
        self._undo.callback(module.register_state_dict_post_hook(write).remove)
        with torch.inference_mode(False), torch.no_grad():
            parameter.data = parameter.data.new_empty(0)

    def restore(self) -> None:
        """Give all their numbers back, one after the other."""
        self._undo.close()


def release_patched_linears(model: nn.Module, undo: ExitStack) -> None:
    """Let go of the weights that ``effinfer.patch`` packed, where no other module reads them; ``undo``
    gives them back."""
    linears = [m for m in model.modules() if isinstance(m, LinearWithPacked)]
    others = (m for m in model.modules() if not isinstance(m, LinearWithPacked))
    released = ReleasedWeights({p.data_ptr() for m in others for p in m.parameters(recurse=False)})

    def still_current() -> None:
        for linear in linears:
            linear._effinfer_stamp = stamp(linear.weight)

    undo.callback(still_current)
    undo.callback(released.restore)
    for linear in linears:
        linear.packed()  # of the present weight
    for linear in linears:
        assert isinstance(linear, nn.Module)
        released.release(linear, "weight", _unpacker(linear))
    still_current()


def _unpacker(linear: LinearWithPacked) -> Callable[[], torch.Tensor]:
    return lambda: unpack_linear(linear._effinfer_packed, linear.out_features)[0]
