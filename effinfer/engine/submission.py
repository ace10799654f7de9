"""Checks of a request before it reaches the engine's thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effinfer.engine.params import SamplingParams
from effinfer.engine.policies import ExitPolicy


class RequestTooLong(ValueError):
    """Prompt and output can never fit the model's positions or the engine's memory."""


@dataclass(frozen=True)
class Limits:
    """What requests of an engine are held to.

    Attributes:
        vocab_size: ids are below it.
        total: tokens of prompt and output together.
        tokenizer: for texts and stop strings; None without.
        loops, r_min: of the model.
        mode: the engine's.
        policy: of exits; None without.
    """

    vocab_size: int
    total: int
    tokenizer: Any
    loops: int
    r_min: int
    mode: str
    policy: ExitPolicy | None

    def prompt(self, ids: Any) -> list[int]:
        """Token ids of a prompt: a sequence, an array, a tensor or a text.

        Raises:
            ValueError, TypeError: it is none, or an id is out of range.
        """
        if isinstance(ids, str):
            if self.tokenizer is None:
                raise ValueError("submit: a text needs an engine with a tokenizer")
            ids = self.tokenizer(ids)["input_ids"]
        try:
            prompt = np.asarray(ids)
        except ValueError as error:
            raise ValueError("submit: ids must be a list of tokens, got lists in it") from error
        if prompt.ndim == 2 and len(prompt) == 1:
            prompt = prompt[0]
        if prompt.ndim != 1:
            raise ValueError(f"submit: ids must be a list of tokens, got {ids!r:.80}")
        if not len(prompt):
            raise ValueError("submit: ids must hold one token or more, got none")
        if prompt.dtype.kind not in "iu":
            raise TypeError(f"submit: ids must be integers, got {prompt.dtype}")
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"submit: ids must be in 0 .. {self.vocab_size - 1}, got {low} .. {high}"
            )
        return [int(token) for token in prompt]

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError when the engine can't do what ``params`` ask, RequestTooLong when it
        could never fit."""
        high = max(params.stop_token_ids, default=0)
        if high >= self.vocab_size:
            raise ValueError(f"submit: stop_token_ids must be below {self.vocab_size}, got {high}")
        if params.stop and self.tokenizer is None:
            raise ValueError("submit: stop needs an engine with a tokenizer")
        if len(prompt) + params.max_tokens > self.total:
            raise RequestTooLong(
                f"submit: prompt and max_tokens must be at most {self.total} together, "
                f"got {len(prompt)} and {params.max_tokens}"
            )
        self._check_depth(params)

    def _check_depth(self, params: SamplingParams) -> None:
        if params.mode not in (None, self.mode, "full"):
            can = "a model of one loop" if self.loops == 1 else f"an engine of mode {self.mode!r}"
            raise ValueError(f"submit: mode {params.mode!r} is not what {can} can do")
        if params.min_loops > self.loops:
            raise ValueError(
                f"submit: min_loops must be at most the model's {self.loops}, "
                f"got {params.min_loops}"
            )
        if params.max_loops is not None:
            exits = self.mode == "exit" and params.mode != "full"
            least = self.r_min if exits else self.loops
            if not least <= params.max_loops <= self.loops:
                what = (
                    f"be in [{least}, {self.loops}]" if exits else f"be {self.loops} without exits"
                )
                raise ValueError(f"submit: max_loops must {what}, got {params.max_loops}")
        if params.exit_threshold is not None and not hasattr(self.policy, "threshold"):
            raise ValueError(
                "submit: exit_threshold needs an engine whose exit policy has a threshold"
            )


def loop_bounds(params: SamplingParams, loops: int) -> tuple[int, int]:
    """The fewest and the most of a model's ``loops`` that a request's tokens may take."""
    if params.mode == "full":
        return loops, loops
    return params.min_loops, params.max_loops or loops


def until(deadline: float | None) -> float:
    """``deadline`` seconds from now on ``time.monotonic()``'s clock; infinity for None."""
    if deadline is None:
        return math.inf
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
        raise TypeError(f"submit: deadline must be seconds, got {deadline!r}")
    if not deadline >= 0:
        raise ValueError(f"submit: deadline must be 0 or more seconds, got {deadline!r}")
    return time.monotonic() + deadline


def each_prompt(prompts: Any) -> list[Any]:
    """The prompts in a list of them, or in another iterable.

    Raises:
        TypeError: it is one text, whose characters would be prompts, or a mapping, whose names would.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(f"generate: prompts must be a list of prompts, got {prompts!r:.80}")
    return list(prompts)


def for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """One for each of ``count`` prompts, from one for all or one for each.

    Raises:
        ValueError, TypeError: their number differs; they are something else.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Mapping) or not isinstance(params, Sequence):
        raise TypeError(f"generate: params must be SamplingParams, got {params!r:.80}")
    if len(params) != count:
        raise ValueError(f"generate: params must be one or {count}, got {len(params)}")
    return list(params)
