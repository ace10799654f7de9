"""Runs llama-like and recursive decoders as a few native calls per layer.

A layer is norm, one product for queries, keys and values, rotation and writing to the pages,
attention, output product with the residual, norm, gated product, and down product with the
residual: eight calls for all rows, on memory that is kept. In a recursive model rows of different
loops share these calls; what a loop has of its own (norms, low-rank additions) is taken by each row
from where its loop's lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from effinfer._native import native
from effinfer.engine.batch import Batch
from effinfer.engine.decoder_model import DecoderLayer, DecoderModel
from effinfer.engine.kv import KVPages
from effinfer.engine.loop_additions import LoopAdditions, loop_additions
from effinfer.engine.projection import (
    Projection,
    lay_end_to_end,
    project,
    project_gated,
    release_weights,
)
from effinfer.engine.released import ReleasedWeights
from effinfer.engine.runner import BLOCK_SIZE, Room, RunnerSpec

QKV = ("q_proj", "k_proj", "v_proj")


class DecoderRunner:
    """A ``Runner`` on packed copies of a decoder's weights.

    With ``release``, they take the place of the model's own until ``close``.
    """

    def __init__(
        self, model: DecoderModel, *, kv_dtype: torch.dtype | None = None, release: bool = False
    ) -> None:
        self._model = model
        self._embedding = model.embedding
        dtype = model.embedding.dtype
        self._kv_dtype = dtype if kv_dtype is None else kv_dtype
        self._planes = model.loops if model.kv_policy == "depth" else 1
        self._released = ReleasedWeights(_read_elsewhere(model))
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._pack(model, release)
        except BaseException:
            self._released.restore()
            raise
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

    def _pack(self, model: DecoderModel, release: bool) -> None:
        self._layers: list[_Layer] = []
        for layer in model.layers:
            self._layers.append(_Layer(layer))
            if release:  # at once, so that there are never two copies of more than a layer
                self._layers[-1].release(layer, self._released)
        self._head = project(model.head)
        self._final_norm = _Norm(model.final_norms)
        if release:
            release_weights(self._head, [model.head], self._released)
        else:
            lay_end_to_end(p for layer in self._layers for p in layer.projections)

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
        self._enter(lib, batch, rows)
        for index, layer in enumerate(self._layers):
            self._attend(lib, batch, rows, layer, index)
            self._mix(lib, batch, rows, layer)
        if self.spec.loops > 1:
            lib.state_copy(self._arena, batch.arena, rows.x, rows.iota)
        return self._logits(lib, batch, rows)

    def propagate(self, exits: np.ndarray[Any, Any]) -> None:
        """As ``Runner.propagate``."""
        lib, loops = native(self._embedding), self.spec.loops
        skipped = [(row, position, slot, loop)
                   for row, position, _, slot, first in exits.tolist()
                   for loop in range(first, loops)]  # fmt: skip
        for start in range(0, len(skipped), self.room.max_rows):
            part = torch.tensor(skipped[start : start + self.room.max_rows], dtype=torch.int32)
            arena, positions, slots, own_loops = part.T.contiguous()
            rows = self._scratch.rows(0, len(part))
            lib.state_copy(rows.x, rows.iota, self._arena, arena)
            for index, layer in enumerate(self._layers):
                self._project_heads(lib, rows, layer, index, own_loops, positions, slots)

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
        """Give back the pages and the packed weights, and the model its own."""
        self._released.restore()
        for name in ("_pages", "_scratch", "_arena", "_layers", "_head"):
            self.__dict__.pop(name, None)

    def _enter(self, lib: Any, batch: Batch, rows: _Rows) -> None:
        """Hidden states into ``x``: embeddings in loop 0, those of the loop before in others."""
        fresh = batch.fresh
        if fresh == rows.count:
            lib.state_copy(rows.x, rows.iota, self._embedding, batch.tokens)
            return
        if fresh:
            new = self._scratch.rows(0, fresh)
            lib.state_copy(new.x, new.iota, self._embedding, batch.tokens[:fresh])
        others = self._scratch.rows(fresh, rows.count)
        lib.state_copy(others.x, others.iota, self._arena, batch.arena[fresh:])

    def _attend(self, lib: Any, batch: Batch, rows: _Rows, layer: _Layer, index: int) -> None:
        """``residual = x + attention(norm(x))``."""
        model = self._model
        keys, values, plane = self._project_heads(
            lib, rows, layer, index, batch.loops, batch.positions, batch.kv_slots
        )
        lib.paged_attention(
            rows.q, keys, values, batch.block_table, batch.lines, batch.positions, plane,
            model.head_dim**-0.5, layer.window, 0.0, rows.heads,
        )  # fmt: skip
        layer.o(lib, rows.attended, rows.residual, rows.x)
        if layer.o_additions is not None:
            layer.o_additions(lib, rows.attended, rows.residual, batch.loops)

    def _project_heads(
        self,
        lib: Any,
        rows: _Rows,
        layer: _Layer,
        index: int,
        loops: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries of ``norm(x)``, its keys and values into the pages; gives the pages, and each row's
        plane of them."""
        model, eps = self._model, self._model.eps
        layer.input_norm(lib, rows.x, loops, eps, rows.normed)
        layer.qkv(lib, rows.normed, rows.qkv)
        if layer.qkv_additions is not None:
            layer.qkv_additions(lib, rows.normed, rows.qkv, loops)
        for norm, heads in ((layer.q_norm, rows.query_heads), (layer.k_norm, rows.key_heads)):
            if norm is not None:
                for head in heads:
                    norm(lib, head, loops, eps, head)
        keys, values = self._pages.keys[index], self._pages.values[index]
        plane = loops if self._planes > 1 else None
        lib.rope_write(
            rows.qkv, self._cos, self._sin, keys, values, kv_slots, positions, plane,
            model.q_heads, model.kv_heads, False,
        )  # fmt: skip
        return keys, values, plane

    def _mix(self, lib: Any, batch: Batch, rows: _Rows, layer: _Layer) -> None:
        """``x = residual + mlp(norm(residual))``."""
        layer.post_norm(lib, rows.residual, batch.loops, self._model.eps, rows.normed)
        if layer.gate_additions is None:
            layer.gate_up(lib, rows.normed, rows.inner)
        else:
            layer.gate_up(lib, rows.normed, rows.gate_up)
            layer.gate_additions(lib, rows.normed, rows.gate_up, batch.loops)
            lib.silu_mul(rows.gate, rows.up, rows.inner)
        layer.down(lib, rows.inner, rows.x, rows.residual)
        if layer.down_additions is not None:
            layer.down_additions(lib, rows.inner, rows.x, batch.loops)

    def _logits(self, lib: Any, batch: Batch, rows: _Rows) -> torch.Tensor | None:
        """Norm and head on the wanted rows alone, in float32."""
        if batch.before_logits is not None:
            batch.before_logits()
        if batch.n_wanted == 0:
            return None
        ends = self._scratch.ends(batch.n_wanted)
        lib.state_copy(ends.hidden, ends.iota, rows.x, batch.wanted)
        if ends.wide is not ends.hidden:
            ends.wide.copy_(ends.hidden)
        self._final_norm(lib, ends.wide, batch.wanted_loops, self._model.eps, ends.wide)
        self._head(lib, ends.wide, ends.logits)
        return ends.logits


class _Norm:
    """RMS norms of rows, each with the weight of its own loop."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._only = weights[0] if len(weights) == 1 else None
        self._weights = torch.stack([weight.float() for weight in weights])

    def __call__(
        self, lib: Any, x: torch.Tensor, loops: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        if self._only is not None:
            lib.rms_norm(x, self._only, eps, None, False, out, None)
        else:
            lib.rms_norm_by_row(x, self._weights, loops, eps, out)


def _head_norm(weights: Sequence[torch.Tensor | None]) -> _Norm | None:
    """None where heads have no norm. A loop that writes no keys has no norm of theirs: any does."""
    given = [weight for weight in weights if weight is not None]
    return _Norm([given[0] if weight is None else weight for weight in weights]) if given else None


def _read_elsewhere(model: DecoderModel) -> set[int]:
    """Addresses of weights with more than one reader: a head's that is the embedding, a layer's that
    is another's too."""
    linears = [linear for layer in model.layers for linear in layer.linears.values()]
    weights = [linear._parameters.get("weight") for linear in (*linears, model.head)]
    readers = Counter(w.data_ptr() for w in (model.embedding, *weights) if w is not None)
    return {address for address, count in readers.items() if count > 1}


class _Layer:
    """A layer's packed weights, and for each loop its norms and additions."""

    def __init__(self, layer: DecoderLayer) -> None:
        linears, loops = layer.linears, layer.loops
        self.window = layer.window or 0  # the op's word for none
        self.input_norm = _Norm([loop.input_norm for loop in loops])
        self.post_norm = _Norm([loop.post_norm for loop in loops])
        self.q_norm = _head_norm([loop.q_norm for loop in loops])
        self.k_norm = _head_norm([loop.k_norm for loop in loops])
        self.qkv = project(*(linears[name] for name in QKV))
        self.o = project(linears["o_proj"])
        self.down = project(linears["down_proj"])
        self.qkv_additions = self._additions(layer, *QKV)
        self.o_additions = self._additions(layer, "o_proj")
        self.down_additions = self._additions(layer, "down_proj")
        gate, up = linears["gate_proj"], linears["up_proj"]
        self.gate_additions = self._additions(layer, "gate_proj", "up_proj")
        # What a loop adds to the gate must be there before the gate is applied.
        self.gated = self.gate_additions is None
        self.gate_up = project_gated(gate, up) if self.gated else project(gate, up)
        self.inner = layer.features("gate_proj")

    def release(self, layer: DecoderLayer, released: ReleasedWeights) -> None:
        """Let go of the model's own weights of this layer."""
        lay_end_to_end(self.projections)
        names = (QKV, ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
        for projection, own in zip(self.projections, names, strict=True):
            release_weights(projection, [layer.linears[name] for name in own], released)

    @staticmethod
    def _additions(layer: DecoderLayer, *names: str) -> LoopAdditions | None:
        widths = [layer.features(name) for name in names]
        loops = [[loop.additions.get(name) for name in names] for loop in layer.loops]
        linear: Any = layer.linears[names[0]]
        return loop_additions(loops, widths, linear.in_features)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The layer's products, in the order in which they are read."""
        return self.qkv, self.o, self.gate_up, self.down


class _Rows:
    """The scratch of rows ``start`` up to ``start + count``, as the native calls take it."""

    def __init__(self, scratch: _Scratch, start: int, stop: int) -> None:
        self.start, self.count = start, stop - start
        here = slice(start, stop)
        self.x, self.residual = scratch.x[here], scratch.residual[here]
        self.normed, self.inner = scratch.normed[here], scratch.inner[here]
        self.qkv, self.gate_up = scratch.qkv[here], scratch.gate_up[here]
        self.gate, self.up = self.gate_up.chunk(2, 1)
        self.attended = scratch.attended[here]
        by_head = (self.count, scratch.q_heads, -1)
        self.heads = self.attended.view(by_head)
        width = self.attended.shape[1]
        self.q = self.qkv[:, :width].view(by_head)
        self.iota = scratch.iota[: self.count]
        # All rows' query (key) head h: rows evenly spaced, as a norm takes them.
        heads = torch.split(self.qkv, width // scratch.q_heads, 1)
        keys = scratch.q_heads + scratch.kv_heads
        self.query_heads, self.key_heads = heads[: scratch.q_heads], heads[scratch.q_heads : keys]


class _Ends:
    """The scratch of the first ``count`` wanted rows: hidden states, those in float32, logits."""

    def __init__(self, scratch: _Scratch, count: int) -> None:
        self.hidden, self.logits = scratch.hidden[:count], scratch.logits[:count]
        self.wide = self.hidden if scratch.wide is scratch.hidden else scratch.wide[:count]
        self.iota = scratch.iota[:count]


class _Scratch:
    """Activations of a launch, kept; the rows of a launch are views, kept too."""

    def __init__(self, runner: DecoderRunner, max_rows: int) -> None:
        model, layers = runner._model, runner._layers
        like, features = model.embedding, model.embedding.shape[1]
        self.q_heads, self.kv_heads = model.q_heads, model.kv_heads
        inner = max(layer.inner for layer in layers)
        width = (model.q_heads + 2 * model.kv_heads) * model.head_dim
        self.x, self.residual, self.normed = like.new_empty(3, max_rows, features)
        self.qkv = like.new_empty(max_rows, width)
        self.attended = like.new_empty(max_rows, model.q_heads * model.head_dim)
        self.inner = like.new_empty(max_rows, inner)
        self.gate_up = like.new_empty(
            max_rows, 0 if all(layer.gated for layer in layers) else 2 * inner
        )
        self.iota = torch.arange(max_rows, dtype=torch.int32)
        self.hidden = like.new_empty(max_rows, features)
        exact = like.dtype == torch.float32
        self.wide = self.hidden if exact else torch.empty(max_rows, features)
        self.logits = torch.empty(max_rows, runner.spec.vocab_size)
        self._views: dict[tuple[int, int], _Rows] = {}
        self._ends: dict[int, _Ends] = {}

    def rows(self, start: int, stop: int) -> _Rows:
        """The scratch of rows ``start`` up to ``stop``."""
        found = self._views.get((start, stop))
        if found is None:
            if len(self._views) >= 1024:  # mixtures of loops come and go
                self._views.clear()
            found = self._views[start, stop] = _Rows(self, start, stop)
        return found

    def ends(self, count: int) -> _Ends:
        """The scratch of ``count`` wanted rows."""
        found = self._ends.get(count)
        if found is None:
            found = self._ends[count] = _Ends(self, count)
        return found
