"""Weights that exist once: parameters that give up their memory while a packed copy stands for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class ReleasedWeights:
    """Parameters without memory, and what makes their numbers again.

    A released parameter stays the object it was, with no elements: what reads it fails rather than
    read something else. Views and other holders of its memory keep what they have.
    """

    def __init__(self) -> None:
        self._released: dict[int, tuple[nn.Parameter, Callable[[], torch.Tensor]]] = {}

    def release(self, parameter: nn.Parameter, unpack: Callable[[], torch.Tensor]) -> None:
        """Let go of the parameter's memory; ``unpack()`` must give its numbers, to the bit."""
        self._released[id(parameter)] = parameter, unpack
        with torch.inference_mode(False), torch.no_grad():
            parameter.data = parameter.data.new_empty(0)

    def restore(self) -> None:
        """Give all their numbers back, one after the other."""
        with torch.inference_mode(False), torch.no_grad():
            while self._released:
                _, (parameter, unpack) = self._released.popitem()
                parameter.data = unpack()
