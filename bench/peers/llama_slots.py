"""Continuous batching over llama.cpp in this process, as llama-server's slots do it.

llama-server's loop in short: every slot that generates puts its last token into the batch; slots
with a prompt left fill it up to `n_batch` tokens; one `llama_decode`; a token for every slot whose
logits came; a slot that has ended takes the next request. No HTTP, text or sampler chain runs here,
which is in llama.cpp's favour; rows are written and logits read through numpy views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.peers.llama import UBATCH, LlamaModel

N_BATCH = 2048  # llama-server's own default


@dataclass
class Slot:
    """A sequence of llama.cpp's and the request it works on."""

    sequence: int
    request: int
    prompt: Sequence[int]
    wanted: int
    fed: int = 0  # of the prompt
    tokens: list[int] = field(default_factory=list)


class LlamaSlots(LlamaModel):
    """A context with `slots` sequences of at most `length` positions."""

    def __init__(self, path: Path, threads: int, slots: int, length: int) -> None:
        super().__init__(path, threads, slots)
        settings = self.api.llama_context_default_params()
        settings.n_ctx = length * slots
        settings.n_batch, settings.n_ubatch = N_BATCH, UBATCH
        settings.n_seq_max = slots
        settings.n_threads = settings.n_threads_batch = threads
        # llama-server's defaults, and twice as fast as a cache for each slot: one for all of them,
        # float16, flash attention where it can.
        settings.kv_unified = True
        self.context = self.api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp refuses the context")
        self.memory = self.api.llama_get_memory(self.context)
        self.batch = batch = self.api.llama_batch_init(N_BATCH, 0, 1)
        view = np.ctypeslib.as_array
        self._token, self._pos = (view(p, (N_BATCH,)) for p in (batch.token, batch.pos))
        self._wants = view(batch.logits, (N_BATCH,))
        # Every row's one sequence: seq_id is an array of pointers, to one int here.
        self._sequence = [batch.seq_id[i] for i in range(N_BATCH)]
        view(batch.n_seq_id, (N_BATCH,))[:] = 1

    def serve(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[list[int]]:
        """Greedy tokens of every request: exactly `outputs` many, whatever they are."""
        self._forget()
        waiting = deque(enumerate(zip(prompts, outputs, strict=True)))
        done: list[list[int]] = [[] for _ in prompts]
        free = list(range(self.sequences - 1, -1, -1))
        running: list[Slot] = []
        while waiting or running:
            while waiting and free:
                request, (prompt, wanted) = waiting.popleft()
                running.append(Slot(free.pop(), request, prompt, wanted))
            for slot, token in self._launch(running):
                slot.tokens.append(token)
            for slot in [s for s in running if len(s.tokens) == s.wanted]:
                done[slot.request] = slot.tokens
                running.remove(slot)
                free.append(slot.sequence)
                self.api.llama_memory_seq_rm(self.memory, slot.sequence, -1, -1)
        return done

    def _launch(self, running: Sequence[Slot]) -> list[tuple[Slot, int]]:
        """One batch: generated tokens first, then prompts; the tokens that came of it."""
        rows = 0
        ends: list[tuple[Slot, int]] = []
        for slot in running:
            if slot.tokens:
                position = len(slot.prompt) + len(slot.tokens) - 1
                self._put(rows, slot, slot.tokens[-1:], position)
                ends.append((slot, rows))
                rows += 1
        for slot in running:
            count = min(len(slot.prompt) - slot.fed, N_BATCH - rows)
            if count > 0:
                self._put(rows, slot, slot.prompt[slot.fed : slot.fed + count], slot.fed)
                rows += count
                slot.fed += count
                if slot.fed == len(slot.prompt):
                    ends.append((slot, rows - 1))
        self._wants[:rows] = 0
        self._wants[[row for _, row in ends]] = 1
        self.batch.n_tokens = rows
        if (code := self.api.llama_decode(self.context, self.batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return [(slot, int(self._logits(row, 1).argmax())) for slot, row in ends]

    def _put(self, row: int, slot: Slot, tokens: Sequence[int], position: int) -> None:
        stop = row + len(tokens)
        self._token[row:stop] = tokens
        self._pos[row:stop] = range(position, position + len(tokens))
        for pointer in self._sequence[row:stop]:
            pointer[0] = slot.sequence
