"""Batches, pages and state slots."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from effinfer.engine.batch import Batch, Span
from effinfer.engine.kv import KVPages, StatePool
from effinfer.patch.linear import end_to_end

TABLE = np.array([[4, 2], [1, 3]], np.int32)


def test_spans_become_rows():
    spans = [Span([7, 8, 9], 15, line=1), Span([5], 3, loop=2, arena=11, writes=False)]
    batch = Batch.of_spans(spans, TABLE, 16, wanted=[2, 3])
    assert batch.rows == 4
    assert batch.tokens.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [15, 16, 17, 3]
    assert batch.loops.tolist() == [0, 0, 0, 2]
    assert batch.arena.tolist() == [0, 1, 2, 11]
    assert batch.lines.tolist() == [1, 1, 1, 0]
    assert batch.kv_slots.tolist() == [1 * 16 + 15, 3 * 16, 3 * 16 + 1, -1]
    assert batch.segments.tolist() == [[0, 3, 0, 1, -1, 0], [3, 1, 2, 0, -1, 0]]
    assert batch.wanted.tolist() == [2, 3]


def test_a_resized_batch_sees_what_its_source_holds_now():
    names = ("tokens", "positions", "loops", "arena", "lines", "kv_slots")
    source = SimpleNamespace(
        **{name: np.zeros(8, np.int32) for name in names},
        segments=np.zeros((8, 6), np.int32),
        wanted=np.zeros(8, np.int32),
        wanted_loops=np.zeros(8, np.int32),
        block_table=TABLE.copy(),
        request_ids=np.array([7, 8]),
    )
    batch = Batch(source)
    batch.resize(3, 2, 1, 3)
    source.tokens[:] = range(8)
    source.block_table[1, 1] = 9
    source.wanted[:] = range(5, 13)
    source.wanted_loops[:] = range(8)
    batch.resize(3, 2, 2, 3)
    assert batch.tokens.tolist() == [0, 1, 2]
    assert len(batch.segments) == 2
    assert batch.wanted.tolist() == [5, 6]
    batch.want(1, 4)
    assert (batch.wanted.tolist(), batch.wanted_loops.tolist()) == ([6, 7, 8], [1, 2, 3])
    batch.want_some(np.array([0, 7]))
    assert (batch.wanted.tolist(), batch.wanted_loops.tolist()) == ([5, 12], [0, 7])
    assert batch.n_wanted == 2
    assert batch.block_table[1, 1] == 9


def test_pages_of_layers_and_planes_do_not_overlap():
    heads = [(2, 4), (1, 8)]
    pages = KVPages(heads, planes=2, blocks=3, block_size=4, dtype=torch.float32)
    for value, part in enumerate([*pages.keys, *pages.values]):
        part.fill_(value)
    for value, part in enumerate([*pages.keys, *pages.values]):
        assert (part == value).all()
    assert pages.keys[0].shape == (2, 3, 4, 2, 4)
    assert pages.memory.nbytes == 3 * KVPages.bytes_per_block(heads, 2, 4, torch.float32)
    pages.poison()
    assert pages.values[1].isnan().all()


def test_state_slots():
    shapes = [(3, 5), (2,)]
    pool = StatePool(shapes, 4)
    pool.poison()
    pool.clear(torch.tensor([1, 3], dtype=torch.int32))
    assert [(s == 0).all(dim=tuple(range(1, s.dim()))).tolist() for s in pool.states] == [
        [False, True, False, True]
    ] * 2
    pool.states[0][1] = 7
    pool.states[1][1] = 8
    pool.copy(np.array([[1, 2], [3, 0]], np.int32))
    assert (pool.states[0][2] == 7).all()
    assert (pool.states[1][2] == 8).all()
    assert (pool.states[0][0] == 0).all()
    assert pool.memory.nbytes == 4 * StatePool.bytes_per_slot(shapes)


def test_weights_end_to_end_keep_their_values():
    weights = [torch.randn(500, 1001), torch.randn(7, 33).bfloat16(), torch.randn(300, 1024)]
    laid = end_to_end(weights)
    for weight, place in zip(weights, laid, strict=True):
        assert torch.equal(weight, place)
        assert place.is_contiguous()
        assert weight.data_ptr() != place.data_ptr()
    assert len({place.untyped_storage().data_ptr() for place in laid}) == 1
    assert end_to_end(weights[1:2])[0] is weights[1]
    assert end_to_end([]) == []
