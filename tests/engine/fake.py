"""A model that is made of nothing but bookkeeping, to catch a scheduler's mistakes.

Its loops compute hashes, but through real arrays: KV pages per plane, state slots per loop, a hidden
arena. All start poisoned. A row's result depends on every key it attends to and on the state it
continues from, so whatever is stale, missing or someone else's shows in the numbers, and where the
place says so (a page or slot never written, or written for another position) it raises at once.

The next token depends mostly on what the numbers of early loops tell as well, so that early exits
and prompt lookup are often right and often wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_MASK = (1 << 64) - 1
_A, _B, _C = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_STEP = 0xD1342543DE82EF95  # of the recurrence


class ReadBeforeWrite(AssertionError):
    """A row read a KV plane, state slot or hidden row that does not hold what it needs."""


@dataclass(frozen=True)
class FakeModel:
    """What defines the fake's numbers, whoever runs it."""

    loops: int = 1
    r_min: int = 1
    kv_policy: str = "depth"
    has_kv: bool = True
    has_state: bool = False
    vocab: int = 5
    memory: int = 2  # of how many different pasts the next token tells: few give repetitive text
    exit_share: int = 2  # of 4 positions that may exit, at each loop
    right_share: int = 6  # of 8 early tokens that are what the last loop says

    def plane(self, loop: Any) -> Any:
        """The KV plane that a loop reads and, unless another loop wrote it, writes."""
        return loop * 0 if self.kv_policy in ("first", "shared") else loop


def mix(x: Any) -> Any:
    """A hash of one 64-bit number: an array of uint64, or an int."""
    if isinstance(x, int):
        x = (x ^ (x >> 30)) * _B & _MASK
        x = (x ^ (x >> 27)) * _C & _MASK
        return x ^ (x >> 31)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_B)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_C)
    return x ^ (x >> np.uint64(31))


def weight(position: Any) -> Any:
    """The odd number that a key at this position counts with."""
    if isinstance(position, int):
        return (2 * position + 1) * _A & _MASK | 1
    return (np.uint64(2) * position.astype(np.uint64) + np.uint64(1)) * np.uint64(_A) | np.uint64(1)


def embed(token: int) -> int:
    return mix(token + 1)


def next_state(state: int, hidden: int) -> int:
    return ((state or 1) * _STEP + hidden) & _MASK


def output(hidden: int, attended: int, state: int, loop: int) -> int:
    """The hidden state after a loop."""
    return mix((hidden + attended + 3 * state + (loop + 1) * _A) & _MASK)


def choose(model: FakeModel, token: int, seen: int, hidden: int) -> tuple[int, bool]:
    """The next token, and whether the policy lets the position exit, from what it knows: its own
    token, a hash of the tokens before it (the same at every loop), and its hidden state."""
    base = mix((token * 977 + seen % model.memory) & _MASK)
    noise = mix(hidden ^ _A)
    if noise % 8 >= model.right_share:
        base += 1
    return base % model.vocab, (noise >> 8) % 4 < model.exit_share


class FakeRunner:
    """Runs launches of a scheduler on a :class:`FakeModel`."""

    def __init__(
        self, model: FakeModel, scheduler: Any, *, blocks: int, block_size: int, states: int
    ):
        self.model, self.s = model, scheduler
        planes = 1 if model.kv_policy in ("first", "shared") else model.loops
        shape = (planes, max(1, blocks) * block_size)
        self.block_size = block_size
        self.keys = np.zeros(shape, np.uint64)  # 0: never written
        self.told = np.zeros(shape, np.uint64)  # the token there, hashed
        self.at = np.full(shape, -1)  # the position it was written for
        self.states = [[(0, 0, -1)] * model.loops for _ in range(states)]  # state, told, position
        self.arena = [(0, -1, -1)] * scheduler.arena_rows  # hidden, position, loops done
        self.hidden_seen: dict[tuple[int, int, int], int] = {}  # of rows with logits
        self.width = max(1, scheduler.block_table.shape[1] * block_size)
        self.every = np.arange(self.width)
        self.weights = weight(self.every)

    def launch(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Run the launch that was planned; the tokens and exits of its wanted rows."""
        s, model = self.s, self.model
        positions, loops = s.positions[:rows], s.loops[:rows]
        hidden = np.array(self._inputs(rows), np.uint64)
        attended = told = np.zeros(rows, np.uint64)
        if model.has_kv:
            self._write(rows, hidden)
            attended, told = self._attend(rows, positions, loops)
        state = [0] * rows
        if model.has_state:
            state, state_told = self._recur(hidden.tolist())
            if not model.has_kv:
                told = np.array(state_told, np.uint64)
        out = [
            output(h, a, z, loop)
            for h, a, z, loop in zip(
                hidden.tolist(), attended.tolist(), state, loops.tolist(), strict=True
            )
        ]
        for row, (place, position, loop) in enumerate(
            zip(s.arena[:rows].tolist(), positions.tolist(), loops.tolist(), strict=True)
        ):
            self.arena[place] = (out[row], position, loop + 1)
        return self._choose(out, told)

    def propagate(self) -> None:
        """What an exit left out, after the commit that let it go: keys from its hidden state."""
        for row, position, _, slot, loop in self.s.propagations[: self.s.n_propagations].tolist():
            hidden, held, done = self.arena[row]
            if (held, done) != (position, loop):
                raise ReadBeforeWrite(f"propagation of position {position} from row {row}")
            self.keys[loop:, slot] = mix(hidden) | 1
            self.told[loop:, slot] = self.told[loop - 1, slot]
            self.at[loop:, slot] = position

    def _inputs(self, rows: int) -> list[int]:
        s, inputs = self.s, []
        for row, (token, position, loop) in enumerate(
            zip(
                s.tokens[:rows].tolist(),
                s.positions[:rows].tolist(),
                s.loops[:rows].tolist(),
                strict=True,
            )
        ):
            if loop == 0:
                inputs.append(embed(token))
                continue
            hidden, held, done = self.arena[s.arena[row]]
            if (held, done) != (position, loop):
                raise ReadBeforeWrite(f"hidden row of position {position} at loop {loop}")
            inputs.append(hidden)
        return inputs

    def _write(self, rows: int, hidden: np.ndarray) -> None:
        s = self.s
        slots = s.kv_slots[:rows]
        writes = slots >= 0
        assert (writes | (s.loops[:rows] > 0)).all()
        at = (self.model.plane(s.loops[:rows])[writes], slots[writes])
        assert len(set(zip(*(a.tolist() for a in at), strict=True))) == len(at[0]), "written twice"
        self.keys[at] = mix(hidden[writes]) | np.uint64(1)
        self.told[at] = mix(s.tokens[:rows][writes].astype(np.uint64) + np.uint64(1))
        self.at[at] = s.positions[:rows][writes]

    def _attend(
        self, rows: int, positions: np.ndarray, loops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        width = int(positions.max()) + 1
        every = self.every[:width]
        table = self.s.block_table[self.s.lines[:rows]][:, every // self.block_size]
        slots = table * self.block_size + every % self.block_size
        visible = every <= positions[:, None]
        plane = self.model.plane(loops)[:, None]
        keys, at = self.keys[plane, slots], self.at[plane, slots]
        if (visible & ((keys == 0) | (at != every))).any():
            raise ReadBeforeWrite("a key that was never written, or for another position")
        weights = np.where(visible, self.weights[:width], np.uint64(0))
        return (keys * weights).sum(1), (self.told[plane, slots] * weights).sum(1)

    def _recur(self, hidden: list[int]) -> tuple[list[int], list[int]]:
        s, states, told = self.s, [], []
        results = []
        for first, rows, loop, _, into, out in s.segments[: s.n_segments].tolist():
            position = int(s.positions[first])
            state, tell, held = (0, 0, 0) if into < 0 else self.states[into][loop]
            if held != position:
                raise ReadBeforeWrite(f"state {into} of loop {loop} is not that of {position}")
            for row in range(first, first + rows):
                state = next_state(state, hidden[row])
                tell = next_state(tell, embed(int(s.tokens[row])))
                states.append(state)
                told.append(tell)
            results.append((out, loop, (state, tell, position + rows)))
        for out, loop, result in results:  # a launch reads every state before it writes any
            self.states[out][loop] = result
        return states, told

    def _choose(self, out: list[int], told: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = self.s
        tokens, exits = [], []
        for i, row in enumerate(s.wanted[: s.n_wanted].tolist()):
            line = s.lines[row]
            request = int(s.request_ids[line])
            assert request == s.wanted_ids[i]
            position, loop = int(s.positions[row]), int(s.loops[row])
            self.hidden_seen[request, position, loop] = out[row]
            token, leaves = choose(self.model, int(s.tokens[row]), int(told[row]), out[row])
            tokens.append(token)
            exits.append(leaves)
        return np.array(tokens, np.int32), np.array(exits, np.uint8)
