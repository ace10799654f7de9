"""Runs llama-like and recursive decoders as a few native calls per layer.

A layer is norm, one product for queries, keys and values, rotation and writing to the pages,
attention, output product with the residual, norm, gated product, and down product with the
residual: eight calls for all rows, on memory that is kept. In a recursive model rows of different
loops share these calls; what a loop has of its own (norms, low-rank additions) runs on its rows,
which lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from effinfer._native import native
from effinfer.engine.batch import Batch
from effinfer.engine.decoder_model import DecoderLayer, DecoderModel
from effinfer.engine.kv import KVPages
from effinfer.engine.loop_additions import LoopAddition, add_up, additions
from effinfer.engine.projection import Projection, lay_end_to_end, project, project_gated
from effinfer.engine.runner import BLOCK_SIZE, Room, RunnerSpec

QKV = ("q_proj", "k_proj", "v_proj")
Part = tuple[int, "_Rows"]  # a loop and its rows


class DecoderRunner:
    """A ``Runner`` on packed copies of a decoder's weights."""

    def __init__(self, model: DecoderModel, *, kv_dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._embedding = model.embedding
        dtype = model.embedding.dtype
        self._kv_dtype = dtype if kv_dtype is None else kv_dtype
        self._planes = model.loops if model.kv_policy == "depth" else 1
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [_Layer(layer) for layer in model.layers]
            self._head = project(model.head)
            lay_end_to_end(p for layer in self._layers for p in layer.projections)
        self._kv_heads = [(model.kv_heads, model.head_dim)] * len(self._layers)
        windows = [layer.window for layer in model.layers]
        self.spec = RunnerSpec(
            vocab_size=self._head.out_features,
            max_positions=model.max_positions,
            loops=model.loops,
            r_min=model.r_min,
            kv_policy=model.kv_policy,
            has_kv=True,
            has_state=False,
            block_size=BLOCK_SIZE,
            bytes_per_block=KVPages.bytes_per_block(
                self._kv_heads, self._planes, BLOCK_SIZE, self._kv_dtype
            ),
            bytes_per_state=0,
            dtype=dtype,
            window=None if None in windows else max(w for w in windows if w is not None),
        )

    def allocate(
        self, *, blocks: int, states: int, max_rows: int, max_slots: int, arena_rows: int = 0
    ) -> None:
        """As ``Runner.allocate``."""
        model = self._model
        self.room = Room(blocks, states, max_rows, max_slots)
        with torch.inference_mode(False), torch.no_grad():
            self._pages = KVPages(
                self._kv_heads,
                planes=self._planes,
                blocks=blocks,
                block_size=BLOCK_SIZE,
                dtype=self._kv_dtype,
            )
            positions = min(model.max_positions, blocks * BLOCK_SIZE)
            self._cos, self._sin = model.rotations(positions)
            self._arena = self._embedding.new_empty(
                arena_rows or max_rows, self._embedding.shape[1]
            )
            self._scratch = _Scratch(self, max_rows)

    def launch(self, batch: Batch) -> torch.Tensor | None:
        """As ``Runner.launch``."""
        if batch.rows == 0:
            return None
        lib = native(self._embedding)
        rows = self._scratch.rows(0, batch.rows)
        parts = self._parts(batch, rows)
        self._enter(lib, batch, rows, parts)
        for index, layer in enumerate(self._layers):
            self._attend(lib, batch, rows, parts, layer, index)
            self._mix(lib, rows, parts, layer)
        if self.spec.loops > 1:
            lib.state_copy(self._arena, batch.arena, rows.x, rows.iota)
        return self._logits(lib, batch, rows)

    def copy_states(self, pairs: np.ndarray[Any, Any]) -> None:
        """Nothing: a decoder has no recurrent states."""

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """As ``Runner.hidden``."""
        return self._arena.index_select(0, rows)

    def poison(self) -> None:
        """As ``Runner.poison``."""
        self._pages.poison()
        self._arena.fill_(torch.nan)

    def close(self) -> None:
        """Give back the pages and the packed weights."""
        for name in ("_pages", "_scratch", "_arena", "_layers", "_head"):
            self.__dict__.pop(name, None)

    def _parts(self, batch: Batch, rows: _Rows) -> list[Part]:
        """The loops present, each with its rows."""
        if self.spec.loops == 1:
            return [(0, rows)]
        loops = batch.loops.numpy()
        return [(loop, self._scratch.rows(start, stop)) for loop, start, stop in _runs(loops)]

    def _enter(self, lib: Any, batch: Batch, rows: _Rows, parts: list[Part]) -> None:
        """Hidden states into ``x``: embeddings in loop 0, those of the loop before in others."""
        first, new = parts[0]
        fresh = new.count if first == 0 else 0
        if fresh == rows.count:
            lib.state_copy(rows.x, rows.iota, self._embedding, batch.tokens)
            return
        if fresh:
            lib.state_copy(new.x, new.iota, self._embedding, batch.tokens[:fresh])
        others = self._scratch.rows(fresh, rows.count)
        lib.state_copy(others.x, others.iota, self._arena, batch.arena[fresh:])

    def _attend(
        self, lib: Any, batch: Batch, rows: _Rows, parts: list[Part], layer: _Layer, index: int
    ) -> None:
        """``residual = x + attention(norm(x))``."""
        model, eps = self._model, self._model.eps
        for loop, part in parts:
            lib.rms_norm(part.x, layer.input_norms[loop], eps, None, False, part.normed, None)
        layer.qkv(lib, rows.normed, rows.qkv)
        for loop, part in parts:
            add_up(lib, layer.qkv_additions[loop], part.normed, part.qkv, part.low)
            for weight, heads in layer.head_norms(loop, part):
                for head in heads:
                    lib.rms_norm(head, weight, eps, None, False, head, None)
        keys, values = self._pages.keys[index], self._pages.values[index]
        plane = batch.loops if self._planes > 1 else None
        lib.rope_write(
            rows.qkv, self._cos, self._sin, keys, values, batch.kv_slots, batch.positions, plane,
            model.q_heads, model.kv_heads, False,
        )  # fmt: skip
        lib.paged_attention(
            rows.q, keys, values, batch.block_table, batch.lines, batch.positions, plane,
            model.head_dim**-0.5, layer.window, 0.0, rows.heads,
        )  # fmt: skip
        layer.o(lib, rows.attended, rows.residual, rows.x)
        for loop, part in parts:
            add_up(lib, layer.o_additions[loop], part.attended, part.residual, part.low)

    def _mix(self, lib: Any, rows: _Rows, parts: list[Part], layer: _Layer) -> None:
        """``x = residual + mlp(norm(residual))``."""
        eps = self._model.eps
        for loop, part in parts:
            lib.rms_norm(part.residual, layer.post_norms[loop], eps, None, False, part.normed, None)
        if not layer.gate_additions:
            layer.gate_up(lib, rows.normed, rows.inner)
        else:
            layer.gate_up(lib, rows.normed, rows.gate_up)
            for loop, part in parts:
                add_up(lib, layer.gate_additions[loop], part.normed, part.gate_up, part.low)
            lib.silu_mul(rows.gate, rows.up, rows.inner)
        layer.down(lib, rows.inner, rows.x, rows.residual)
        for loop, part in parts:
            add_up(lib, layer.down_additions[loop], part.inner, part.x, part.low)

    def _logits(self, lib: Any, batch: Batch, rows: _Rows) -> torch.Tensor | None:
        """Norm and head on the wanted rows alone, in float32."""
        if batch.before_logits is not None:
            batch.before_logits()
        count = len(batch.wanted)
        if count == 0:
            return None
        scratch = self._scratch
        wanted, logits = scratch.wanted[:count], scratch.logits[:count]
        lib.state_copy(wanted, scratch.iota[:count], rows.x, batch.wanted)
        ends = scratch.ends[:count]
        ends.copy_(wanted)
        norms, eps = self._model.final_norms, self._model.eps
        loops = batch.loops.numpy()[batch.wanted.numpy()]
        for loop, start, stop in _runs(loops):
            part = ends[start:stop]
            lib.rms_norm(part, norms[loop], eps, None, False, part, None)
        self._head(lib, ends, logits)
        return logits


def _runs(loops: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, int]]:
    """Each run of equal loops: the loop, its first row and the row after its last."""
    starts = [0, *(np.flatnonzero(loops[1:] != loops[:-1]) + 1).tolist(), len(loops)]
    return ((int(loops[start]), start, stop) for start, stop in pairwise(starts))


class _Layer:
    """A layer's packed weights, and for each loop its norms and additions."""

    def __init__(self, layer: DecoderLayer) -> None:
        linears, loops = layer.linears, layer.loops
        self.window = layer.window or 0  # the op's word for none
        self.input_norms = [loop.input_norm for loop in loops]
        self.post_norms = [loop.post_norm for loop in loops]
        self.q_norms = [loop.q_norm for loop in loops]
        self.k_norms = [loop.k_norm for loop in loops]
        self.qkv = project(*(linears[name] for name in QKV))
        self.o = project(linears["o_proj"])
        self.down = project(linears["down_proj"])
        self.qkv_additions = self._additions(layer, *QKV)
        self.o_additions = self._additions(layer, "o_proj")
        self.down_additions = self._additions(layer, "down_proj")
        gate, up = linears["gate_proj"], linears["up_proj"]
        self.gate_additions = self._additions(layer, "gate_proj", "up_proj")
        if all(addition is None for addition in self.gate_additions):
            self.gate_additions = []
        # What a loop adds to the gate must be there before the gate is applied.
        self.gate_up = project(gate, up) if self.gate_additions else project_gated(gate, up)
        self.inner = layer.features("gate_proj")

    @staticmethod
    def _additions(layer: DecoderLayer, *names: str) -> list[LoopAddition | None]:
        widths = [layer.features(name) for name in names]
        return [additions([loop.additions.get(n) for n in names], widths) for loop in layer.loops]

    def head_norms(
        self, loop: int, rows: _Rows
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """The loop's norms of queries and keys, where there are any, and the heads they are for."""
        for weight, heads in (
            (self.q_norms[loop], rows.query_heads),
            (self.k_norms[loop], rows.key_heads),
        ):
            if weight is not None:
                yield weight, heads

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The layer's products, in the order in which they are read."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def rank(self) -> int:
        """The widest low-rank product of any loop."""
        every = (self.qkv_additions, self.o_additions, self.gate_additions, self.down_additions)
        return max((a.rank for group in every for a in group if a is not None), default=0)


class _Rows:
    """The scratch of rows ``start`` up to ``start + count``, as the native calls take it."""

    def __init__(self, scratch: _Scratch, start: int, stop: int) -> None:
        self.start, self.count = start, stop - start
        here = slice(start, stop)
        self.x, self.residual = scratch.x[here], scratch.residual[here]
        self.normed, self.inner = scratch.normed[here], scratch.inner[here]
        self.qkv, self.gate_up = scratch.qkv[here], scratch.gate_up[here]
        self.gate, self.up = self.gate_up.chunk(2, 1)
        self.attended, self.low = scratch.attended[here], scratch.low[here]
        by_head = (self.count, scratch.q_heads, -1)
        self.heads = self.attended.view(by_head)
        width = self.attended.shape[1]
        self.q = self.qkv[:, :width].view(by_head)
        self.iota = scratch.iota[: self.count]
        # All rows' query (key) head h: rows evenly spaced, as a norm takes them.
        heads = torch.split(self.qkv, width // scratch.q_heads, 1)
        keys = scratch.q_heads + scratch.kv_heads
        self.query_heads, self.key_heads = heads[: scratch.q_heads], heads[scratch.q_heads : keys]


class _Scratch:
    """Activations of a launch, kept; the rows of a launch are views, kept too."""

    def __init__(self, runner: DecoderRunner, max_rows: int) -> None:
        model, layers = runner._model, runner._layers
        like, features = model.embedding, model.embedding.shape[1]
        self.q_heads, self.kv_heads = model.q_heads, model.kv_heads
        inner = max(layer.inner for layer in layers)
        width = (model.q_heads + 2 * model.kv_heads) * model.head_dim
        gated = any(layer.gate_additions for layer in layers)
        self.x, self.residual, self.normed = like.new_empty(3, max_rows, features)
        self.qkv = like.new_empty(max_rows, width)
        self.attended = like.new_empty(max_rows, model.q_heads * model.head_dim)
        self.inner = like.new_empty(max_rows, inner)
        self.gate_up = like.new_empty(max_rows, 2 * inner if gated else 0)
        self.low = like.new_empty(max_rows, max(layer.rank for layer in layers))
        self.iota = torch.arange(max_rows, dtype=torch.int32)
        self.wanted = like.new_empty(max_rows, features)
        self.ends = torch.empty(max_rows, features)
        self.logits = torch.empty(max_rows, runner.spec.vocab_size)
        self._views: dict[tuple[int, int], _Rows] = {}

    def rows(self, start: int, stop: int) -> _Rows:
        """The scratch of rows ``start`` up to ``stop``."""
        found = self._views.get((start, stop))
        if found is None:
            if len(self._views) >= 1024:  # mixtures of loops come and go
                self._views.clear()
            found = self._views[start, stop] = _Rows(self, start, stop)
        return found
