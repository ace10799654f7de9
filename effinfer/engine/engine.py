"""The engine: many requests over one model, in launches that mix them."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from effinfer.engine.choose import Live
from effinfer.engine.core import Core
from effinfer.engine.handle import Handle, Output
from effinfer.engine.params import SamplingParams
from effinfer.engine.policies import ExitPolicy
from effinfer.engine.progress import shown
from effinfer.engine.sampling import RowParams
from effinfer.engine.setup import Setup, prepare
from effinfer.engine.stats import EngineStats
from effinfer.engine.submission import Limits, each_prompt, for_each, until
from effinfer.engine.text import TextStream
from effinfer.errors import EffinferError


class QueueFull(EffinferError):
    """As many requests wait as may wait; try again later."""


class EngineClosed(EffinferError):
    """The engine takes no requests any more."""


class Engine:
    """Runs requests over one model: continuous and, for recursive models, depth-wise batching.

    Every step is one launch of the model's loop for rows of many requests, at their own depths.
    Results do not depend on what else runs: in float32 a row's logits have the same bits in every
    batch, and random numbers are a function of (seed, position).

    Args:
        model: a causal LM in eval mode, stock or patched; or a runner.
        tokenizer: for text and stop strings.
        max_slots: requests that run at once.
        token_budget: rows of a launch.
        memory_bytes: for keys and values and recurrent states; None for a quarter of the memory that
            is free, or what ``max_slots`` sequences of ``max_positions`` can use, if that is less.
        max_positions: of a sequence, prompt and output together; None for the model's.
        mode: "full": every token runs all loops. "exit": ``policy`` may take it earlier.
            "lossless": it may draft it, and the remaining loops verify it; tokens are full depth's.
        policy: of exits; None for the one in the model's configuration, and in "lossless" for a margin
            that suits drafts.
        exited_kv: in mode "exit", the keys and values of loops that an exit skipped. "fill": those
            loops run later, and what is attended to is exact. "propagate": they are made from the
            hidden state at the exit, which costs two products a layer and is not exact:
            ``stats()["exits_agreed"]`` of ``stats()["exits_checked"]`` sampled exits gave full
            depth's token, on the keys and values there were.
        max_queue: requests that may wait.
        prefill_chunk: prompt tokens of a launch.
        max_ngram: tokens to draft from the sequence itself, for models of one loop.
        prefix_cache: keep prompts' blocks and states for prompts that begin alike.
        costs: seconds of a launch of 1 to ``token_budget`` rows, which drafts are weighed by; None
            measures them when drafts are asked for.
        kv_dtype: of keys and values; None for the model's.
        patch: patch a model that gains by it, until ``close``.
        release_weights: the packed weights take the place of the model's own until ``close``, which
            halves their memory; the model is of no other use meanwhile.
        eos_token_ids: tokens that end a request; None for the model's.

    Raises:
        ValueError, TypeError: arguments out of range.
        UnsupportedModelError: the model can't be run; the message lists why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_slots: int = 32,
        token_budget: int = 256,
        memory_bytes: int | None = None,
        max_positions: int | None = None,
        mode: str = "full",
        policy: ExitPolicy | None = None,
        exited_kv: str = "fill",
        max_queue: int = 1024,
        prefill_chunk: int = 128,
        max_ngram: int = 0,
        prefix_cache: bool = True,
        costs: Sequence[float] | None = None,
        kv_dtype: torch.dtype | None = None,
        patch: bool = True,
        release_weights: bool = False,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        setup = Setup(
            max_slots=max_slots,
            token_budget=token_budget,
            memory_bytes=memory_bytes,
            max_positions=max_positions,
            mode=mode,
            policy=policy,
            exited_kv=exited_kv,
            prefill_chunk=prefill_chunk,
            max_ngram=max_ngram,
            prefix_cache=prefix_cache,
            costs=costs,
            kv_dtype=kv_dtype,
            patch=patch,
            release_weights=release_weights,
            eos_token_ids=eos_token_ids,
        )
        if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 0:
            raise ValueError(f"Engine: max_queue must be 0 or more, got {max_queue!r}")
        parts = prepare(model, setup)
        # In close(), or when an engine that nobody closed is gone.
        self._release = weakref.finalize(self, parts.runner.close)
        self._release.atexit = False
        self.tokenizer = tokenizer
        self.mode = mode
        self.runner, self.pools = parts.runner, parts.pools
        spec = parts.runner.spec
        self.limits = Limits(
            spec.vocab_size, parts.max_total, tokenizer, spec.loops, spec.r_min, mode, parts.policy
        )
        self._eos = parts.eos_token_ids
        self.max_slots = max_slots
        self._max_queue = max_queue
        self._scheduler = parts.scheduler
        self._stats = EngineStats()
        self._core = Core(parts, self._stats)
        self._ids = itertools.count()
        # Other threads only add to these; the thread that steps takes from them.
        self._submitted: deque[tuple[Live, int, float]] = deque()
        self._cancelled: deque[int] = deque()
        self._submit_lock = threading.Lock()
        self._step_lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._work = threading.Event()  # there may be something to do
        self._stopping = self._broken = False
        self._refuses: str | None = None  # why no request is taken any more

    # Requests.

    def submit(
        self,
        ids: Sequence[int] | torch.Tensor | np.ndarray[Any, Any] | str,
        params: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Handle:
        """Queue a request; from any thread.

        Args:
            ids: the prompt's tokens, or a text when the engine has a tokenizer.
            params: how to sample, and when to stop.
            deadline: seconds from now after which it ends as "deadline", with the tokens so far.
            priority: the greater runs first; bounded, so that none waits for ever.

        Raises:
            RequestTooLong: it can never fit.
            QueueFull: too many wait.
            EngineClosed: the engine drains, is closed, or broke down.
            ValueError, TypeError: bad arguments.
        """
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**31:
            raise ValueError(f"submit: priority must be an int of 32 bits, got {priority!r}")
        try:
            return self._submit(ids, params, until(deadline), priority)
        except QueueFull:
            self._stats.rejected += 1
            raise

    def _submit(
        self, ids: Any, params: SamplingParams | None, deadline: float, priority: int
    ) -> Handle:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"submit: params must be SamplingParams, got {params!r:.80}")
        prompt = self.limits.prompt(ids)
        self.limits.check(prompt, params)
        own_stops = () if params.ignore_eos else self._eos
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *own_stops)))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        row = RowParams(params, seed, len(prompt), stop_ids)
        text = None
        if params.stop:
            text = TextStream(self.tokenizer, tuple(params.stop), params.min_tokens)
        with self._submit_lock:
            self._check_room()
            handle = Handle(self, next(self._ids), prompt, params, stop_ids)
            self._submitted.append((Live(handle, row, text), priority, deadline))
            self._stats.prompt_tokens += len(prompt)
        self._work.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request before the next launch, as "cancelled"; from any thread."""
        self._cancelled.append(handle.request_id)
        self._work.set()

    def generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Output]:
        """Run prompts (token ids or texts) to their ends; outputs in the same order.

        Args:
            prompts: a list of them.
            params: for all, or one for each.
            progress: show a bar.

        Raises:
            ValueError, TypeError: as ``submit``; or prompts are a single text, or no list.
        """
        prompts = each_prompt(prompts)
        handles: list[Handle] = []
        try:
            for prompt, one in zip(prompts, for_each(params, len(prompts)), strict=True):
                handles.append(self._submit_when_there_is_room(prompt, one))
            return [handle.result() for handle in shown(handles, progress)]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    async def agenerate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """``generate`` for ``await``; starts the engine's thread."""
        self.run_in_thread()
        return await asyncio.to_thread(self.generate, prompts, params)

    # Running.

    def step(self) -> bool:
        """Run one launch, and deliver what came of it; False when there was nothing to do.

        Raises:
            Exception: what the model raised for all requests alike; every one has ended as "error".
                What it raises for some ends those alone.
            KeyboardInterrupt: every request has ended as "cancelled"; the engine takes others.
        """
        if not torch.is_inference_mode_enabled():  # which costs as much as planning does
            with torch.inference_mode():
                return self.step()
        with self._step_lock:
            if self._stopping or self._broken:
                return False
            try:
                taken = self._take_inbox()
                return self._core.step() or taken
            except Exception as error:
                self._break_down(error)
                raise
            except BaseException:  # Ctrl-C, which may come between a plan and its commit
                self._core.abandon()
                self._end_all("cancelled")
                raise

    def drive(self) -> bool:
        """A step in the calling thread; False when the engine's own thread does them."""
        if self._thread is not None and self._thread is not threading.current_thread():
            return False
        self.step()
        return True

    def run_in_thread(self) -> None:
        """Run steps in a thread of the engine's own, whenever there is something to do."""
        with self._submit_lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="effinfer", daemon=True)
                self._thread.start()

    def drain(self) -> None:
        """Take no more requests, and run those that are there to their ends."""
        with self._submit_lock:
            self._refuses = self._refuses or "it drains"
        while self._core.live or self._submitted:
            if not self.drive():
                time.sleep(0.001)

    async def adrain(self) -> None:
        """``drain`` for ``await``."""
        self.run_in_thread()
        await asyncio.to_thread(self.drain)

    def close(self) -> None:
        """Cancel what runs, stop the thread, give back the memory and unpatch what was patched."""
        with self._submit_lock:
            if self._stopping:
                return
            self._stopping = True
            self._refuses = self._refuses or "it is closed"
        self._work.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._step_lock:
            self._end_all("cancelled")
            self._release()

    async def aclose(self) -> None:
        """``close`` for ``await``."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def broken(self) -> bool:
        """True when it broke down or was closed: it does nothing any more."""
        return self._broken or self._stopping

    @property
    def full(self) -> bool:
        """True when a request would be refused, for as many wait as may wait."""
        scheduler = self._scheduler
        room = self._max_queue + max(0, self.max_slots - scheduler.running)
        return bool(len(self._submitted) + scheduler.waiting >= room)

    def stats(self) -> dict[str, Any]:
        """Counts: the scheduler's (rows by kind, blocks, drafts, depths), and the engine's; from any
        thread. ``slots`` tells of each running request: its id ``request``, ``kind`` ("prefill" or
        "decode"), ``prompt_tokens``, ``tokens`` so far, ``max_tokens``, ``depth`` of the last token,
        and the ``loops`` that what it has in flight is at."""
        scheduler = self._scheduler.stats()
        scheduler["waiting"] += len(self._submitted)
        return {**scheduler, **self._stats.to_dict(), "slots": self._core.slots()}

    # What the above share.

    @torch.inference_mode()
    def _run(self) -> None:
        while not (self._stopping or self._broken):
            self._work.clear()
            try:
                busy = self.step()
            except Exception:
                return  # every handle has been told
            if not busy and not self._stopping:
                self._work.wait()

    def _take_inbox(self) -> bool:
        """Hand submissions and cancels on to the core; False when there were none."""
        taken = bool(self._submitted or self._cancelled)
        while self._submitted:
            self._core.admit(*self._submitted[0])  # an interrupt loses none
            self._submitted.popleft()
        while self._cancelled:
            self._core.cancel(self._cancelled.popleft())
        return taken

    def _break_down(self, error: Exception) -> None:
        what = f"the engine broke down: {type(error).__name__}: {error}"
        with self._submit_lock:
            self._broken = True
            self._refuses = what
        self._end_all("error", what)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        while self._submitted:
            request = self._submitted.popleft()[0]
            self._core.live[request.handle.request_id] = request
        self._core.end_all(reason, error)

    def _check_room(self) -> None:
        if self._refuses is not None:
            raise EngineClosed(f"submit: the engine takes no requests: {self._refuses}")
        if self.full:
            raise QueueFull(f"submit: {self._max_queue} requests are waiting already")

    def _submit_when_there_is_room(self, prompt: Any, params: SamplingParams | None) -> Handle:
        while True:
            try:
                return self._submit(prompt, params, math.inf, 0)
            except QueueFull:
                if not self.drive():
                    time.sleep(0.001)
