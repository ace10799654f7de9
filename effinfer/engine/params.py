"""What a request may ask of sampling, checked once, when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 64
MODES = ("full", "exit", "lossless")


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Filters apply in transformers' order: penalties, temperature, top-k, top-p, min-p.

    Args:
        max_tokens: tokens to generate at most.
        temperature: 0 is greedy; the filters and the seed then have no say.
        top_k: keep the k most probable tokens, and those as probable as the last of them; 0 keeps all.
        top_p: keep the most probable tokens until their probabilities add up to this.
        min_p: keep tokens at least this fraction as probable as the most probable one.
        repetition_penalty: divides positive logits of tokens in the prompt or the output so far, and
            multiplies negative ones.
        presence_penalty: subtracted from the logits of tokens in the output so far.
        frequency_penalty: the same, times how often each was generated.
        seed: of the counter-based generator. The same seed gives the same tokens, whatever else
            runs; None draws one.
        stop: strings that end the output, which is cut before the first of them.
        stop_token_ids: tokens that end the output, beside the model's own end-of-sequence tokens.
        ignore_eos: go on past the model's own end-of-sequence tokens.
        logprobs: log probabilities to report for each token: its own, and the most probable n. They
            are the model's, before penalties and filters. None reports none.
        min_tokens: generate no stop token, and look for no stop string, before this many tokens.
        mode: of a recursive model: the engine's own, or "full" in an engine of another mode: no
            token exits early, or is drafted. None is the engine's.
        min_loops: loops that every token runs; the exit policy is asked from then on (one that
            compares with the loop before can't tell until the next).
        max_loops: loops after which a token is taken at the latest, in an engine of mode "exit"; but
            the first takes all where a prompt can't exit (keys and values that are "shared" or
            propagated). None is all.
        exit_threshold: replaces that of the engine's policy: tokens whose score is greater exit, or
            are drafted. In the terms of the policy's scores (of "entropy": minus nats).

    Raises:
        ValueError, TypeError: an argument out of its range; the message names it.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_tokens: int = 0
    mode: str | None = None
    min_loops: int = 1
    max_loops: int | None = None
    exit_threshold: float | None = None

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, 2**31 - 1)
        self._number("temperature", 0.0, 100.0)
        self._integer("top_k", 0, 2**31 - 1)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, 100.0, above=True)
        self._number("presence_penalty", -100.0, 100.0)
        self._number("frequency_penalty", -100.0, 100.0)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        self._integer("min_tokens", 0, self.max_tokens)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(_wrong("ignore_eos", "be a bool", self.ignore_eos))
        self._depth()
        self._set("stop", self._stop_strings())
        self._set("stop_token_ids", self._stop_ids())

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """True when what was generated before changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(_wrong(name, "be an int", value))
        if not low <= value <= high:
            raise ValueError(_wrong(name, f"be in [{low}, {high}]", value))

    def _number(self, name: str, low: float, high: float, above: bool = False) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(_wrong(name, "be a number", value))
        inside = low < value <= high if above else low <= value <= high  # false for NaN too
        if not inside:
            bracket = "(" if above else "["
            raise ValueError(_wrong(name, f"be in {bracket}{low:g}, {high:g}]", value))
        self._set(name, float(value))

    def _depth(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(_wrong("mode", f"be one of {', '.join(MODES)}", self.mode))
        self._integer("min_loops", 1, 2**31 - 1)
        if self.max_loops is not None:
            self._integer("max_loops", self.min_loops, 2**31 - 1)
        if self.exit_threshold is None:
            return
        self._number("exit_threshold", -math.inf, math.inf)
        if self.mode == "full":
            raise ValueError(
                _wrong("exit_threshold", "be None in mode 'full'", self.exit_threshold)
            )

    def _stop_strings(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable):
            raise TypeError(_wrong("stop", "be a string or strings", stop))
        stop = tuple(stop)
        for string in stop:
            if not isinstance(string, str):
                raise TypeError(_wrong("stop", "hold strings", string))
            if not string:
                raise ValueError(_wrong("stop", "hold no empty string", string))
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"SamplingParams: stop must hold at most {MAX_STOP_STRINGS} strings")
        return stop

    def _stop_ids(self) -> tuple[int, ...]:
        if not isinstance(self.stop_token_ids, Iterable):
            raise TypeError(_wrong("stop_token_ids", "be token ids", self.stop_token_ids))
        ids = tuple(self.stop_token_ids)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(_wrong("stop_token_ids", "hold ints", token))
            if not 0 <= token < 2**31:
                raise ValueError(_wrong("stop_token_ids", "hold ids of 0 or more", token))
        return ids


def _wrong(name: str, what: str, got: Any) -> str:
    return f"SamplingParams: {name} must {what}, got {got!r:.80}"
