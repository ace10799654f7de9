"""The most probable tokens, and the exits of a policy of the two largest probabilities, natively."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effinfer._native import native
from effinfer.engine.policies import ExitPolicy, Margin, MaxProb

Array = np.ndarray[Any, Any]
_BY_MARGIN: dict[type[ExitPolicy], bool] = {Margin: True, MaxProb: False}


class GreedyExits:
    """What ``sampling.greedy`` and ``policy.decide`` say of a launch's rows, in three native calls
    on memory that is kept: after a launch has read its weights nothing else is in the caches, and
    each numpy function takes 20 us there.

    Args:
        policy: one of those that ``judges``.
    """

    def __init__(self, policy: ExitPolicy) -> None:
        self._policy, self._by_margin = policy, _BY_MARGIN[type(policy)]
        self._kept: dict[int, tuple[Array, Array, torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def judges(policy: ExitPolicy | None) -> bool:
        """Whether the policy's scores are those of ``Margin`` or ``MaxProb`` themselves."""
        return type(policy) in _BY_MARGIN

    def __call__(self, logits: torch.Tensor) -> tuple[Array, Array] | None:
        """Tokens ``(n,)`` int32 and exits ``(n,)`` uint8 of ``logits (n, vocab)`` float32, valid until
        the next call; None where a row holds NaN or +inf, or nothing but -inf."""
        n = len(logits)
        kept = self._kept.get(n)
        if kept is None:
            tokens, exits = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.uint8)
            kept = (tokens, exits, torch.from_numpy(exits), torch.empty(n, 2))
            self._kept[n] = kept
        tokens, exits, leaving, largest = kept
        lib = native(logits)
        lib.most_probable(logits, tokens)
        lib.softmax_top2(logits, largest)
        sound = lib.top2_exits(largest, leaving, self._policy.threshold, self._by_margin)
        return (tokens, exits) if sound else None
