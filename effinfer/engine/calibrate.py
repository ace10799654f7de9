"""How sure is sure enough: exit thresholds from data, with a stated agreement and confidence.

"Learn then Test" (Angelopoulos et al., arXiv 2110.01052), as "Confident Adaptive Language Modeling"
(Schuster et al., arXiv 2207.07061) uses it: thresholds fixed beforehand are tested one after the
other, from the safest on, each by an exact binomial test of "the exit's token differs from full
depth's more often than allowed". The last one before the first that can't be rejected is taken; the
chance that it disagrees more often than allowed is at most 1 - confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from effinfer.engine.policies import BY_NAME, Array, ExitPolicy, ExitRows, Gate
from effinfer.errors import UnsupportedModelError


@dataclass(frozen=True)
class Calibration:
    """An exit threshold and what is known of it.

    Attributes:
        policy: its name.
        threshold: rows whose score exceeds it exit.
        agreement: least fraction of tokens that are full depth's.
        confidence: that this holds for tokens like those it was calibrated on.
        tokens, disagreements: positions looked at, and those whose exit had another token.
        depth: mean number of loops on them, of ``loops``.
    """

    policy: str
    threshold: float
    agreement: float
    confidence: float
    tokens: int
    disagreements: int
    depth: float
    loops: int

    def to_config(self) -> dict[str, Any]:
        """What goes into a recursive model's configuration as ``exit``."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.policy} > {self.threshold:.6g}: at least {self.agreement:.2%} of tokens are full "
            f"depth's, with confidence {self.confidence:.0%}\n"
            f"on {self.tokens} tokens {1 - self.disagreements / self.tokens:.2%} were, "
            f"at a mean depth of {self.depth:.3f} of {self.loops} loops"
        )


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    policy: str | Gate = "margin",
    agreement: float = 0.99,
    confidence: float = 0.95,
    thresholds: Sequence[float] | None = None,
    tokenizer: Any = None,
    verbose: bool = True,
) -> Calibration:
    """Find the exit threshold of a recursive model, and store it in ``model.config.exit``.

    Teacher forced: at every position of ``data``, the most probable token of each loop is compared
    with that of the last, all earlier keys and values being those of full depth (as exact fill
    makes them). The binomial test takes positions as independent; those of one text are not quite,
    so give many texts, of the kind that will be generated.

    Args:
        model: with loops (``effinfer.recursive``).
        data: texts (with ``tokenizer``), or token ids: lists or tensors, ``(T,)`` or ``(batch, T)``.
        policy: "margin", "stable_margin", "max_prob", "entropy" or "cosine"; or a gate (which is
            not stored: a configuration can't hold a module).
        agreement: wanted fraction of tokens that are full depth's.
        confidence: that it is reached.
        thresholds: to try, from the safest on; chosen before seeing ``data``. By default 200 over
            the range of the policy's scores.
        verbose: print the result.

    Raises:
        ValueError: arguments out of range, or too few tokens to be confident of anything.
        UnsupportedModelError: the model has no loops.
    """
    for name, value in (("agreement", agreement), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"calibrate: {name} must be in (0, 1), got {value!r}")
    chosen = _policy(policy)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "loops") or not hasattr(config, "r_min"):
        raise UnsupportedModelError(
            f"calibrate: {type(model).__name__} has no loops; effinfer.to_recursive makes some"
        )
    scores, right = _judge(model, _as_ids(data, tokenizer), chosen)
    if thresholds is None:
        thresholds = default_thresholds(chosen.name, config.vocab_size)
    found = choose_threshold(
        scores, right, thresholds, r_min=config.r_min, agreement=agreement, confidence=confidence
    )
    loops, tokens = scores.shape
    depths = exit_depths(scores, found, config.r_min)
    result = Calibration(
        policy=chosen.name,
        threshold=found,
        agreement=agreement,
        confidence=confidence,
        tokens=tokens,
        disagreements=int((~right[depths - 1, np.arange(tokens)]).sum()),
        depth=float(depths.mean()),
        loops=loops,
    )
    if chosen.name in BY_NAME:
        config.exit = result.to_config()
    if verbose:
        print(result)
    return result


def binomial_tail(errors: int, n: int, rate: float) -> float:
    """P(X <= errors) for X ~ Binomial(n, rate), summed exactly; 0 < rate < 1."""
    if errors >= n:
        return 1.0
    j = np.arange(1, errors + 1, dtype=np.float64)
    steps = np.log((n - j + 1) / j) + math.log(rate) - math.log1p(-rate)
    logs = n * math.log1p(-rate) + np.concatenate([[0.0], np.cumsum(steps)])
    largest = logs.max()
    return float(min(1.0, math.exp(largest) * np.exp(logs - largest).sum()))


def exit_depths(scores: Array, threshold: float, r_min: int = 1) -> Array:
    """Loops that tokens run, ``(n,)`` in r_min .. R, by their scores ``(R, n)`` at each loop."""
    sure = scores > threshold
    sure[: r_min - 1] = False
    sure[-1] = True
    return np.asarray(sure.argmax(axis=0)) + 1


def choose_threshold(
    scores: Array,
    right: Array,
    thresholds: Iterable[float],
    *,
    r_min: int = 1,
    agreement: float = 0.99,
    confidence: float = 0.95,
) -> float:
    """The last of ``thresholds`` before the first whose agreement can't be vouched for.

    Args:
        scores: ``(R, n)`` of n tokens at each loop.
        right: ``(R, n)`` bool, whether the loop's token is full depth's.
        thresholds: from the safest on.

    Raises:
        ValueError: not even the first can be vouched for.
    """
    n = scores.shape[1]
    found = None
    for threshold in thresholds:
        depths = exit_depths(scores, threshold, r_min)
        errors = int((~right[depths - 1, np.arange(n)]).sum())
        if binomial_tail(errors, n, 1.0 - agreement) > 1.0 - confidence:
            break
        found = float(threshold)
    if found is None:
        needed = math.ceil(math.log(1.0 - confidence) / math.log(agreement))
        raise ValueError(
            f"calibrate: no threshold reaches agreement {agreement} with confidence {confidence} on "
            f"{n} tokens; it takes {needed} tokens without a disagreement at least"
        )
    return found


def default_thresholds(policy: str, vocab_size: int, count: int = 200) -> list[float]:
    """Scores to try for a policy, from the safest on; the first lets no token exit."""
    if policy == "entropy":
        return [-value for value in [0.0, *np.geomspace(1e-4, math.log(vocab_size), count)]]
    if policy == "cosine":
        return [1.0 - value for value in [0.0, *np.geomspace(1e-5, 1.0, count)]]
    return [1.0 - i / count for i in range(count + 1)]


def _policy(policy: str | Gate) -> ExitPolicy:
    if isinstance(policy, Gate):
        return policy
    if policy not in BY_NAME:
        raise ValueError(
            f"calibrate: policy must be a gate or one of {', '.join(BY_NAME)}, got {policy!r}"
        )
    return BY_NAME[policy](0.0)


def _as_ids(data: Any, tokenizer: Any) -> list[torch.Tensor]:
    """``(batch, T)`` int64 tensors."""
    if isinstance(data, (str, torch.Tensor)):
        data = [data]
    found = []
    for item in data:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("calibrate: data holds texts; pass tokenizer=")
            item = tokenizer(item)["input_ids"]
        ids = torch.as_tensor(item, dtype=torch.int64)
        found.append(ids if ids.dim() == 2 else ids[None])
    if not any(ids.numel() for ids in found):
        raise ValueError("calibrate: data is empty")
    return [ids for ids in found if ids.numel()]


def _judge(
    model: nn.Module, batches: Sequence[torch.Tensor], policy: ExitPolicy
) -> tuple[Array, Array]:
    """Scores ``(R, n)`` and whether the token is full depth's ``(R, n)``, at every position."""
    scores, right = [], []
    for ids in batches:
        with torch.inference_mode():
            logits, hidden = _loop_outputs(model, ids)
        tops = [one.argmax(dim=-1).numpy() for one in logits]
        n = ids.numel()
        rows = [
            ExitRows(
                logits=loop_logits,
                top=top,
                loops=np.full(n, loop),
                positions=np.arange(n),
                requests=np.zeros(n, dtype=np.int64),
                arena=np.arange(n),
                hidden=lambda after=after: after,  # type: ignore[misc]
            )
            for loop, (loop_logits, top, after) in enumerate(zip(logits, tops, hidden, strict=True))
        ]
        scores.append(np.stack([policy.scores(row) for row in rows]))
        right.append(np.stack([top == tops[-1] for top in tops]))
    return np.concatenate(scores, axis=1), np.concatenate(right, axis=1)


def _loop_outputs(
    model: nn.Module, ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits ``(n, vocab)`` and hidden states ``(n, hidden)`` after each loop, one of each a loop."""
    hidden: list[torch.Tensor] = []
    body: Any = model.model
    hooks = [  # what a loop's norm before the head is given is what the next loop goes on from
        loop.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for loop in body.loops
    ]
    try:
        output = model(input_ids=ids, use_cache=False, output_loop_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [one.float().flatten(0, 1) for one in output.loop_logits], [
        one.float().flatten(0, 1) for one in hidden
    ]
