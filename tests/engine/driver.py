"""Drives a scheduler and the fake model with whatever users do, and checks every promise."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from effinfer import _native
from tests.engine.fake import FakeModel, FakeRunner
from tests.engine.oracle import Answer, Oracle

TOKEN, LENGTH, STOP, CANCELLED, DEADLINE, ERROR = range(6)


@cache
def _answer(model: FakeModel, mode: str, chunk: int, *request: Any) -> Answer:
    return Oracle(model, mode, chunk).answer(*request)


@dataclass
class Sent:
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    deadline: float
    loops: tuple[int, int | None] = (1, None)  # the fewest and the most that tokens may take
    tokens: list[int] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)  # endings that somebody asked for
    admitted_at: int = -1
    idle: int = 0  # launches without a row of it


class Driver:
    """A scheduler with the fake model behind it, and what each request has been told so far."""

    def __init__(self, model: FakeModel, mode: str, **config: Any):
        self.model, self.mode = model, mode
        self.config = {"prefix_cache": True, "max_ngram": 0, "num_states": 0, **config}
        self.s = _native.module("_C").Scheduler(
            mode=mode,
            loops=model.loops,
            r_min=model.r_min,
            kv_policy=model.kv_policy,
            has_kv=model.has_kv,
            **self.config,
        )
        self.runner = FakeRunner(
            model,
            self.s,
            blocks=config["num_blocks"],
            block_size=config["block_size"],
            states=self.config["num_states"],
        )
        self.chunk = min(config["prefill_chunk"], config["max_rows"])
        self.live: dict[int, Sent] = {}
        self.ended: dict[int, int] = {}
        self.ids = 0
        self.now = 0.0
        self.launches = 0
        # Left out of 8 launches, a request goes first, after those that wait longer. Only a prompt
        # may have to wait until another's chunk, of which every loop is as patient, has gone.
        self.patience = (8 + config["max_slots"] + 1) * (model.loops + 1)

    def submit(
        self,
        prompt: tuple[int, ...],
        max_new_tokens: int,
        stop_ids: tuple[int, ...] = (),
        priority: int = 0,
        deadline: float = float("inf"),
        loops: tuple[int, int | None] = (1, None),
    ) -> int:
        self.ids += 1
        ids = np.array(prompt, np.int32)
        self.s.submit(self.ids, ids, max_new_tokens, list(stop_ids), priority, deadline, *loops)
        self.live[self.ids] = Sent(prompt, max_new_tokens, stop_ids, deadline, loops)
        return self.ids

    def end(self, request: int, kind: int) -> None:
        ask = {CANCELLED: self.s.cancel, STOP: self.s.finish, ERROR: self.s.fail}[kind]
        sent = self.live.get(request)
        assert ask(request) == (sent is not None and not sent.asked)
        if sent is not None:
            sent.asked.add(kind)

    def plan(self) -> int:
        rows: int = self.s.plan(self.now)
        self._read_events()
        if rows:
            self._check_launch(rows)
        return rows

    def commit(self, rows: int) -> None:
        tokens, exits = self.runner.launch(rows)
        self.s.commit(tokens, exits, self.now)
        self.runner.propagate()
        self._read_events()

    def tick(self) -> int:
        """One launch; its rows."""
        if rows := self.plan():
            self.commit(rows)
        return rows

    def drain(self) -> None:
        for _ in range(100_000):
            if not self.tick() and not self.live:
                break
        self.s.check()
        stats = self.s.stats()
        assert not self.live
        assert (stats["running"], stats["waiting"], stats["queue_tokens"]) == (0, 0, 0)
        blocks = self.config["num_blocks"] if self.model.has_kv else 0
        assert stats["free_blocks"] + stats["idle_blocks"] == blocks
        assert stats["free_states"] + stats["idle_states"] == self.config["num_states"]

    def expected(self, sent: Sent) -> Answer:
        mode = "exit" if self.mode == "exit" else "full"
        chunk = self.chunk if self.model.kv_policy == "shared" else 1 << 20
        request = (sent.prompt, sent.max_new_tokens, sent.stop_ids, *sent.loops)
        return _answer(self.model, mode, chunk, *request)

    def _check_launch(self, rows: int) -> None:
        s = self.s
        self.launches += 1
        assert rows <= self.config["max_rows"]
        order = list(
            zip(
                s.loops[:rows].tolist(),
                s.lines[:rows].tolist(),
                s.positions[:rows].tolist(),
                strict=True,
            )
        )
        assert order == sorted(set(order))
        assert len(set(s.arena[:rows].tolist())) == rows
        covered = 0
        for first, count, loop, line, *_ in s.segments[: s.n_segments].tolist():
            assert first == covered
            assert {o[:2] for o in order[first : first + count]} == {(loop, line)}
            covered += count
        assert covered == rows
        aboard = {int(s.request_ids[line]) for _, line, _ in order}
        running = set(s.request_ids[s.request_ids >= 0].tolist())
        assert aboard <= running
        for request in running:
            sent = self.live[request]
            sent.idle = 0 if request in aboard or sent.asked else sent.idle + 1
            assert sent.idle <= self.patience, "starved"

    def _read_events(self) -> None:
        for request, token, depth, kind in self.s.events[: self.s.n_events].tolist():
            sent = self.live[request]
            if kind == TOKEN or (kind == STOP and token >= 0):
                self._check_token(request, sent, token, depth)
            if kind == TOKEN:
                continue
            assert (kind == DEADLINE) <= (sent.deadline <= self.now)
            if kind in (CANCELLED, ERROR) or (kind == STOP and token < 0):
                assert kind in sent.asked
            if kind == LENGTH or (kind == STOP and token >= 0):
                assert sent.tokens == self.expected(sent).tokens
                assert self.expected(sent).stopped == (kind == STOP)
            del self.live[request]
            self.ended[request] = kind

    def _check_token(self, request: int, sent: Sent, token: int, depth: int) -> None:
        assert not sent.asked, "a token after its request was ended"
        want, n = self.expected(sent), len(sent.tokens)
        assert (token, depth) == (want.tokens[n], want.depths[n])
        position = len(sent.prompt) + n - 1
        assert self.runner.hidden_seen[request, position, depth - 1] == want.hidden[n]
        sent.tokens.append(token)


def random_driver(rng: random.Random, **fixed: Any) -> Driver:
    """A driver of a random small configuration; ``fixed`` overrides its choices."""
    mode = fixed.pop("mode", rng.choice(("full", "exit", "lossless")))
    loops = fixed.pop("loops", rng.choice((1, 2, 2, 3, 4)))
    has_kv = fixed.pop("has_kv", rng.random() < 0.8)
    has_state = fixed.pop("has_state", not has_kv or rng.random() < 0.4)
    policies = ("depth", "depth", "first", "shared", "propagate")
    model = FakeModel(
        loops=loops,
        r_min=rng.randint(1, loops),
        kv_policy=fixed.pop("kv_policy", rng.choice(policies) if has_kv else "depth"),
        has_kv=has_kv,
        has_state=has_state,
        vocab=rng.choice((3, 5, 50)),
        memory=rng.choice((1, 2, 1000)),
        exit_share=rng.choice((0, 1, 2, 4)),
        right_share=rng.choice((2, 6, 8)),
    )
    max_ngram = rng.choice((0, 1, 3)) if loops == 1 else 0
    slots, block = rng.randint(1, 5), rng.choice((1, 2, 4))
    own = 0 if not has_state else 2 if max_ngram else loops if mode == "lossless" else 1
    max_rows = rng.choice((1, 2, 3, 5, 8, 16))
    slope = rng.choice((0.0, 0.1, 1.0))
    config: dict[str, Any] = {
        "max_slots": slots,
        "max_rows": max_rows,
        "prefill_chunk": rng.randint(1, 6),
        "block_size": block,
        "num_blocks": -(-24 // block) * rng.randint(1, slots),
        "num_states": own * rng.randint(1, slots) + (rng.randint(0, 3) if has_state else 0),
        "max_positions": 24,
        "max_ngram": max_ngram,
        "prefix_cache": rng.random() < 0.7,
        "costs": [1 + slope * n for n in range(max_rows)],
    }
    return Driver(model, mode, **{**config, **fixed})


def random_loops(rng: random.Random, driver: Driver) -> tuple[int, int]:
    """Bounds of a request's depth that the mode allows."""
    model = driver.model
    most = rng.randint(model.r_min, model.loops) if driver.mode == "exit" else model.loops
    return rng.randint(1, most), most


def random_request(rng: random.Random, driver: Driver) -> int:
    """Submit a request, often with a prefix that others have."""
    limit = driver.config["max_positions"]
    length = rng.choice((1, 2, rng.randint(1, limit - 1), rng.randint(1, 8)))
    base = rng.randint(0, 2)
    prompt = [(base + i * i) % 3 for i in range(length)]
    if rng.random() < 0.5:
        prompt[-1] = rng.randrange(driver.model.vocab)
    room = limit - length
    return driver.submit(
        tuple(prompt),
        rng.choice((1, room, rng.randint(1, room), min(room, 4))),
        stop_ids=(rng.randrange(driver.model.vocab),) if rng.random() < 0.2 else (),
        priority=rng.choice((0, 0, 0, 1, -1)),
        deadline=driver.now + rng.uniform(0, 20) if rng.random() < 0.1 else float("inf"),
        loops=random_loops(rng, driver) if rng.random() < 0.4 else (1, None),
    )
