"""What an engine is made of, from its arguments: runner, pools, scheduler, policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effinfer import _native
from effinfer.engine import memory, policies
from effinfer.engine.params import MODES
from effinfer.engine.policies import ExitPolicy
from effinfer.engine.profile import measure_costs
from effinfer.engine.runner import Runner, RunnerSpec, make_runner

EXITED_KV = ("fill", "propagate")
DRAFT_MARGIN = 0.1  # of a draft in "lossless": it is checked, so may be less sure than an exit


@dataclass(frozen=True)
class Setup:
    """The arguments of ``Engine``, checked where they don't depend on the model."""

    max_slots: int
    token_budget: int
    memory_bytes: int | None
    max_positions: int | None
    mode: str
    policy: ExitPolicy | None
    exited_kv: str
    prefill_chunk: int
    max_ngram: int
    prefix_cache: bool
    costs: Sequence[float] | None
    kv_dtype: torch.dtype | None
    patch: bool
    release_weights: bool
    eos_token_ids: Iterable[int] | None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_slots", 1),
            ("token_budget", 1),
            ("prefill_chunk", 1),
            ("max_ngram", 0),
            ("memory_bytes", 1),
            ("max_positions", 2),
        ):
            value = getattr(self, name)
            if value is None and name in ("memory_bytes", "max_positions"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Engine: {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"Engine: {name} must be {least} or more, got {value}")
        if isinstance(self.eos_token_ids, (int, str)):
            raise TypeError(
                f"Engine: eos_token_ids must be a list of token ids, got {self.eos_token_ids!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"Engine: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.policy is not None and not hasattr(self.policy, "decide"):
            raise TypeError(f"Engine: policy must be an exit policy, got {self.policy!r:.80}")
        if self.exited_kv not in EXITED_KV:
            raise ValueError(
                f"Engine: exited_kv must be one of {', '.join(EXITED_KV)}, got {self.exited_kv!r}"
            )
        if self.exited_kv == "propagate" and self.mode != "exit":
            raise ValueError(f"Engine: exited_kv 'propagate' needs mode 'exit', got {self.mode!r}")
        if self.costs is not None and len(self.costs) != self.token_budget:
            raise ValueError(
                f"Engine: costs must have token_budget = {self.token_budget} entries, "
                f"got {len(self.costs)}"
            )


@dataclass
class Parts:
    """What an engine drives; ``max_total`` tokens of prompt and output fit."""

    runner: Runner
    scheduler: Any
    pools: memory.Pools
    policy: ExitPolicy | None
    max_total: int
    eos_token_ids: tuple[int, ...]


def prepare(model: Any, setup: Setup) -> Parts:
    """Make the parts; what was made is undone when one fails.

    Raises:
        ValueError, UnsupportedModelError: as ``Engine``.
    """
    if hasattr(model, "launch") and hasattr(model, "spec"):
        runner: Runner = model
    else:
        runner = make_runner(
            model,
            kv_dtype=setup.kv_dtype,
            patch=setup.patch,
            release_weights=setup.release_weights,
        )
    try:
        return _prepare(model, runner, setup)
    except BaseException:
        runner.close()
        raise


def _prepare(model: Any, runner: Runner, setup: Setup) -> Parts:
    spec = runner.spec
    policy = _policy(model, spec, setup)
    positions = min(spec.max_positions, setup.max_positions or spec.max_positions)
    pools = memory.divide(
        spec,
        setup.memory_bytes,
        max_slots=setup.max_slots,
        max_positions=positions,
        states_per_request=_states_per_request(spec, setup),
        prefix_cache=setup.prefix_cache,
    )

    def scheduler(costs: Sequence[float], head_costs: Sequence[float] = ()) -> Any:
        return _native.module("_C").Scheduler(
            loops=spec.loops,
            r_min=spec.r_min,
            mode=setup.mode,
            kv_policy=_kv_policy(spec, setup),
            max_slots=setup.max_slots,
            max_rows=setup.token_budget,
            prefill_chunk=setup.prefill_chunk,
            block_size=spec.block_size,
            num_blocks=pools.blocks,
            has_kv=spec.has_kv,
            num_states=pools.states,
            max_positions=positions,
            max_ngram=setup.max_ngram,
            prefix_cache=setup.prefix_cache,
            costs=list(costs),
            head_costs=list(head_costs),
        )

    made = scheduler(setup.costs or [0.0] * setup.token_budget)
    with torch.inference_mode():
        runner.allocate(
            blocks=pools.blocks,
            states=pools.states,
            max_rows=setup.token_budget,
            max_slots=setup.max_slots,
            arena_rows=made.arena_rows,
        )
        drafts = setup.mode == "lossless" or setup.max_ngram > 0
        if drafts and setup.costs is None:  # now that there is memory to measure in
            made = scheduler(*measure_costs(runner, setup.token_budget, policy))
    total = positions
    if spec.has_kv:
        total = min(total, pools.blocks * spec.block_size + 1)  # the last token is never fed
    return Parts(runner, made, pools, policy, total, _eos(model, setup))


def _kv_policy(spec: RunnerSpec, setup: Setup) -> str:
    if setup.exited_kv == "fill":
        return spec.kv_policy
    if spec.kv_policy != "depth":
        raise ValueError(
            "Engine: exited_kv 'propagate' needs a model with kv_policy 'depth'; with "
            f"{spec.kv_policy!r} an exit owes no keys and values"
        )
    return "propagate"


def _policy(model: Any, spec: RunnerSpec, setup: Setup) -> ExitPolicy | None:
    if setup.mode == "full":
        if setup.policy is not None:
            raise ValueError("Engine: a policy needs mode 'exit' or 'lossless'")
        return None
    if spec.loops == 1:
        raise ValueError(f"Engine: mode {setup.mode!r} needs a model with loops; this one has 1")
    if setup.policy is not None:
        return setup.policy
    if setup.mode == "lossless":
        return policies.margin(DRAFT_MARGIN)
    stored = getattr(getattr(model, "config", None), "exit", None)
    if stored is not None:
        return policies.from_config(stored)
    raise ValueError(
        "Engine: mode 'exit' needs a policy: the model's configuration has none; "
        "effinfer.engine.calibrate finds one"
    )


def _states_per_request(spec: RunnerSpec, setup: Setup) -> int:
    """State slots that the scheduler takes for a running request."""
    if not spec.has_state:
        return 0
    if setup.mode == "lossless":
        return spec.loops  # a ring, so that a flushed draft leaves the state before it
    return 2 if setup.max_ngram > 0 else 1


def _eos(model: Any, setup: Setup) -> tuple[int, ...]:
    if setup.eos_token_ids is not None:
        return tuple(int(token) for token in setup.eos_token_ids)
    for holder in ("generation_config", "config"):
        found = getattr(getattr(model, holder, None), "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
