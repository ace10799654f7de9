"""When a token needs no more loops: exit policies, over all rows of a launch at once.

A policy gives each row a score, the higher the surer; a row exits when its score exceeds the
policy's threshold. A row's score depends on that row, and what the policy saw of its token in
earlier loops, alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from effinfer._native import native
from effinfer.ops.linear import linear, pack_linear

Array = np.ndarray[Any, Any]


@dataclass
class ExitRows:
    """The rows of a launch whose logits are there, for a policy to judge.

    Attributes:
        logits: ``(n, vocab)`` float32, after the loop each row has just run; empty for a policy that
            needs none.
        top: ``(n,)`` each row's most probable token; likewise.
        loops: ``(n,)`` that loop, from 0.
        positions: ``(n,)`` each row's position in its sequence.
        requests: ``(n,)`` int64 request ids.
        arena: ``(n,)`` where the row's hidden state is kept: the same from loop to loop.
        hidden: gives the hidden states ``(n, hidden)`` after that loop.
        thresholds: ``(n,)`` float64 that replace the policy's, NaN for rows of requests that have
            none of their own; None where none has.
    """

    logits: torch.Tensor
    top: Array
    loops: Array
    positions: Array
    requests: Array
    arena: Array
    hidden: Callable[[], torch.Tensor]
    thresholds: Array | None = None


class ExitPolicy:
    """Base of the policies.

    Attributes:
        name: as it is written in a recursive model's configuration.
        needs_logits: where False, the head runs on the rows that exit alone, and ``decide`` is asked
            before it.
        threshold: rows whose score is greater exit.
    """

    name: ClassVar[str]
    needs_logits: ClassVar[bool] = True

    def __init__(self, threshold: float) -> None:
        if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
            raise TypeError(f"{self.name}: threshold must be a number, got {threshold!r}")
        if threshold != threshold:
            raise ValueError(f"{self.name}: threshold must not be NaN")
        self.threshold = float(threshold)

    def scores(self, rows: ExitRows) -> Array:
        """How sure each row is, ``(n,)``; -inf where the policy can't tell yet."""
        raise NotImplementedError

    def decide(self, rows: ExitRows) -> Array:
        """1 where the row's token is final, ``(n,)`` uint8, not to be written to. Called once per
        launch."""
        if rows.thresholds is None:
            return exits([score > self.threshold for score in self.scores(rows).tolist()])
        own = np.where(np.isnan(rows.thresholds), self.threshold, rows.thresholds)
        return exits((self.scores(rows) > own).tolist())


def exits(leaving: list[bool]) -> Array:
    """``leaving`` as ``decide`` gives it.

    Lists, because they are short: after a launch has read its weights no numpy function is in the
    caches any more, and each costs 20 to 30 us, whatever it computes.
    """
    return np.array(leaving, dtype=np.uint8) if True in leaving else nobody(len(leaving))


@functools.cache
def nobody(rows: int) -> Array:
    """What ``decide`` gives where none of ``rows`` exits."""
    return np.zeros(rows, dtype=np.uint8)


class Margin(ExitPolicy):
    """Exits when the two largest probabilities differ by more than the threshold.

    "Confident Adaptive Language Modeling" (Schuster et al., arXiv 2207.07061), softmax response.
    """

    name = "margin"

    def scores(self, rows: ExitRows) -> Array:
        """Between 0 and 1."""
        first, second = _top2(rows.logits).T
        return np.asarray(first - second)  # NaN for an unsound row, which does not exit


class MaxProb(ExitPolicy):
    """Exits when the largest probability is above the threshold."""

    name = "max_prob"

    def scores(self, rows: ExitRows) -> Array:
        """Between 0 and 1."""
        return _top2(rows.logits)[:, 0]


class Entropy(ExitPolicy):
    """Exits when the entropy of the probabilities is below -threshold nats.

    ``entropy(t)`` takes t itself: "BranchyNet" (Teerapittayanon et al., arXiv 1709.01686).
    """

    name = "entropy"

    def scores(self, rows: ExitRows) -> Array:
        """Minus the entropy: 0 or less."""
        logprobs = torch.log_softmax(rows.logits, dim=-1).clamp(min=-200.0)  # 0 * -inf is NaN
        return _row_dot(_probabilities(rows), logprobs)


class StableMargin(ExitPolicy):
    """``Margin``, where the loop before had the same most probable token."""

    name = "stable_margin"

    def __init__(self, threshold: float) -> None:
        super().__init__(threshold)
        self._margin = Margin(threshold)
        self._before = _Remembered()

    def scores(self, rows: ExitRows) -> Array:
        """The margin; -inf where the token changed, or the loop before was not judged."""
        known, before = self._before.swap(rows, rows.top)
        stable = known & (before == rows.top)
        return np.where(stable, self._margin.scores(rows), -np.inf)


class Cosine(ExitPolicy):
    """Exits when the loop turned the hidden state by little: its cosine with that of the loop
    before is above the threshold."""

    name = "cosine"
    needs_logits = False

    def __init__(self, threshold: float) -> None:
        super().__init__(threshold)
        self._before = _Remembered()

    def scores(self, rows: ExitRows) -> Array:
        """Between -1 and 1; -inf where the loop before was not judged."""
        hidden = rows.hidden().double()
        known, before = self._before.swap(rows, hidden.numpy())
        previous = torch.from_numpy(before)
        length = np.sqrt(_row_dot(hidden, hidden) * _row_dot(previous, previous))
        cosine = _row_dot(hidden, previous) / np.where(length > 0, length, 1.0)
        return np.where(known, cosine, -np.inf)


class Gate(ExitPolicy):
    """Exits when a learned gate's probability is above the threshold.

    Args:
        module: hidden states ``(n, hidden)`` to ``(n,)`` or ``(n, 1)``, before the sigmoid. Rows are
            independent of the batch when it treats them so; an ``nn.Linear`` is run by
            ``effinfer.ops.linear``, which does.
    """

    name = "gate"
    needs_logits = False

    def __init__(self, module: Callable[[torch.Tensor], torch.Tensor], threshold: float) -> None:
        super().__init__(threshold)
        if not callable(module):
            raise TypeError(f"gate: module must be callable, got {module!r:.80}")
        self._module = module
        if type(module) is nn.Linear:
            packed = pack_linear(module.weight.float())
            bias = None if module.bias is None else module.bias.detach().float()
            self._module = lambda hidden: linear(hidden.float(), packed, module.out_features, bias)

    def scores(self, rows: ExitRows) -> Array:
        """Between 0 and 1."""
        hidden = rows.hidden()
        logit = self._module(hidden)
        if logit.numel() != len(hidden):
            raise ValueError(
                f"gate: module must give one number a row, got shape {tuple(logit.shape)}"
            )
        return np.asarray(1.0 / (1.0 + np.exp(-logit.reshape(-1).double().numpy())))


class Replay(ExitPolicy):
    """Exits where a recorded trace did, whatever the logits say: for measuring.

    Args:
        depths: loops that tokens run, 1 or more: ``(positions,)``, or ``(sequences, positions)``.
            The token at position p of request r runs ``depths[r % sequences, p % positions]``.
    """

    name = "replay"
    needs_logits = False

    def __init__(self, depths: Any) -> None:
        super().__init__(0.0)
        table = np.atleast_2d(np.asarray(depths, dtype=np.int32))
        if table.ndim != 2 or table.size == 0 or table.min() < 1:
            raise ValueError("replay: depths must be 1 or more, of one or two dimensions")
        self._depths: list[list[int]] = table.tolist()

    def scores(self, rows: ExitRows) -> Array:
        """1 from the recorded depth on, else -1."""
        return 2.0 * self.decide(rows) - 1.0

    def decide(self, rows: ExitRows) -> Array:
        """As ``ExitPolicy.decide``; no request's own threshold has a say."""
        depths, sequences, positions = self._depths, len(self._depths), len(self._depths[0])
        tokens = zip(
            rows.requests.tolist(), rows.positions.tolist(), rows.loops.tolist(), strict=True
        )
        return exits(
            [loop + 1 >= depths[id_ % sequences][at % positions] for id_, at, loop in tokens]
        )


def margin(threshold: float) -> Margin:
    """Exit when the top two probabilities differ by more than ``threshold``."""
    return Margin(threshold)


def stable_margin(threshold: float) -> StableMargin:
    """``margin``, and the loop before has the same most probable token."""
    return StableMargin(threshold)


def max_prob(threshold: float) -> MaxProb:
    """Exit when the largest probability is above ``threshold``."""
    return MaxProb(threshold)


def entropy(threshold: float) -> Entropy:
    """Exit when the probabilities' entropy is below ``threshold`` nats."""
    return Entropy(-threshold)


def cosine(threshold: float) -> Cosine:
    """Exit when the hidden state's cosine with that of the loop before is above ``threshold``."""
    return Cosine(threshold)


def gate(module: Callable[[torch.Tensor], torch.Tensor], threshold: float) -> Gate:
    """Exit when sigmoid(``module(hidden)``) is above ``threshold``."""
    return Gate(module, threshold)


def replay(depths: Any) -> Replay:
    """Exit at recorded depths."""
    return Replay(depths)


BY_NAME: dict[str, Callable[[float], ExitPolicy]] = {
    policy.name: policy for policy in (Margin, StableMargin, MaxProb, Entropy, Cosine)
}


def from_config(exit_config: dict[str, Any]) -> ExitPolicy:
    """The policy that a recursive model's configuration carries in ``exit``.

    Raises:
        ValueError: of no known name.
    """
    name = exit_config.get("policy")
    if name not in BY_NAME:
        raise ValueError(f"exit: policy must be one of {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name](exit_config["threshold"])


class _Remembered:
    """What each arena row's token gave in the loop before."""

    def __init__(self) -> None:
        self._keys = np.full((0, 3), -1, dtype=np.int64)  # request, position, loop
        self._values: Array | None = None

    def swap(self, rows: ExitRows, values: Array) -> tuple[Array, Array]:
        """Keep ``values (n, ...)``; gives what the loop before kept, and where it did."""
        arena = rows.arena
        self._grow(int(arena.max(initial=-1)) + 1, values)
        assert self._values is not None
        keys = np.stack([rows.requests, rows.positions, rows.loops], axis=1)
        before = keys - np.array([0, 0, 1])
        known = (self._keys[arena] == before).all(axis=1)
        kept = self._values[arena]
        self._keys[arena] = keys
        self._values[arena] = values
        return known, kept

    def _grow(self, size: int, values: Array) -> None:
        if self._values is None:
            self._values = np.zeros((0, *values.shape[1:]), dtype=values.dtype)
        more = size - len(self._values)
        if more > 0:
            self._keys = np.concatenate([self._keys, np.full((more, 3), -1, dtype=np.int64)])
            empty = np.zeros((more, *values.shape[1:]), dtype=self._values.dtype)
            self._values = np.concatenate([self._values, empty])


def _top2(logits: torch.Tensor) -> Array:
    """``softmax_top2`` ``(n, 2)`` by its native call alone."""
    largest = logits.new_empty(len(logits), 2)
    native(logits).softmax_top2(logits, largest)
    return largest.numpy()


def _probabilities(rows: ExitRows) -> torch.Tensor:
    return torch.softmax(rows.logits, dim=-1)


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> Array:
    """``(n,)`` sums of a * b over the last dimension, in float64; one row at a time, so that the
    order of the sum is the same for one row as for many."""
    pairs = zip(a.double().numpy(), b.double().numpy(), strict=True)
    return np.array([np.dot(x, y) for x, y in pairs])
