from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import paged_attention
from tests.conftest import DTYPES, assert_close

NAN = float("nan")


@dataclass
class Problem:
    """Sequences in scattered pages of a poisoned pool, and rows that read them."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_of_row: torch.Tensor
    position: torch.Tensor
    plane: torch.Tensor | None = None

    def args(self):
        return (
            self.q,
            self.k_pages,
            self.v_pages,
            self.block_table,
            self.seq_of_row,
            self.position,
        )

    def run(self, **options):
        return paged_attention(*self.args(), plane=self.plane, **options)

    def exact(self, scale=None, window=0, softcap=0.0):
        q, k, v = (t.cpu().double() for t in (self.q, self.k_pages, self.v_pages))
        rest = (t.cpu() for t in self.args()[3:])
        plane = None if self.plane is None else self.plane.cpu()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return paged_attention.reference(q, k, v, *rest, plane, scale, window, softcap)

    def rows(self, index):
        index = torch.as_tensor(index, device=self.q.device)
        plane = None if self.plane is None else self.plane[index]
        return replace(
            self,
            q=self.q[index],
            seq_of_row=self.seq_of_row[index],
            position=self.position[index],
            plane=plane,
        )


def randn(shape, generator, dtype):
    return torch.randn(shape, generator=generator).to(dtype)


def in_columns(pages):
    """The same keys, positions side by side in memory: as the engine keeps them."""
    return pages.movedim(-3, -1).contiguous().movedim(-1, -3)


def problem(
    lengths,
    rows=None,
    *,
    q_heads=4,
    kv_heads=2,
    k_dim=16,
    v_dim=None,
    block_size=16,
    planes=None,
    dtype=torch.float32,
    kv_dtype=None,
    columns=None,
    device="cpu",
    seed=0,
):
    """``rows`` are (sequence, position) pairs, by default each sequence's last position. Only slots
    that hold a sequence's tokens are finite; unused table entries name blocks outside the pool. Keys
    lie in columns wherever they may, if not told."""
    g = torch.Generator().manual_seed(seed)
    v_dim = v_dim or k_dim
    kv_dtype = kv_dtype or dtype
    rows = [(s, n - 1) for s, n in enumerate(lengths)] if rows is None else rows
    used = [-(-n // block_size) for n in lengths]
    blocks = sum(used) + 3
    k_pages, v_pages = (
        torch.full((planes or 1, blocks, block_size, kv_heads, dim), NAN, dtype=kv_dtype)
        for dim in (k_dim, v_dim)
    )
    table = torch.full((len(lengths), max(used, default=0) + 1), 2**30, dtype=torch.int32)
    free = torch.randperm(blocks, generator=g).tolist()
    for s, n in enumerate(lengths):
        table[s, : used[s]] = torch.tensor([free.pop() for _ in range(used[s])], dtype=torch.int32)
        t = torch.arange(n)
        block = table[s].long()[t // block_size]
        for pages, dim in ((k_pages, k_dim), (v_pages, v_dim)):
            shape = (n, planes or 1, kv_heads, dim)
            pages[:, block, t % block_size] = randn(shape, g, kv_dtype).transpose(0, 1)
    if columns or (columns is None and block_size % 16 == 0):
        k_pages = in_columns(k_pages)
    sequence, position = torch.tensor(rows, dtype=torch.int32).reshape(-1, 2).unbind(1)
    plane = None if planes is None else torch.randint(planes, (len(rows),), generator=g)
    result = Problem(
        randn((len(rows), q_heads, k_dim), g, dtype),
        k_pages if planes else k_pages[0],
        v_pages if planes else v_pages[0],
        table,
        sequence.contiguous(),
        position.contiguous(),
        plane if plane is None else plane.int(),
    )
    for name, value in vars(result).items():
        setattr(result, name, None if value is None else value.to(device))
    return result


def prompt(sequence, length, begin=0):
    return [(sequence, t) for t in range(begin, length)]


def check(p, bound=None, **options):
    out = p.run(**options)
    assert_close(out, p.exact(**options), bound)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_decode_matches_float64(device, dtype, kv_dtype):
    check(problem([1, 97, 64, 130], dtype=dtype, kv_dtype=kv_dtype, device=device))


@pytest.mark.parametrize("k_dim", [1, 16, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_head_dims_and_groups(device, k_dim, group):
    rows = [(0, 70), *prompt(1, 9)]
    check(problem([71, 9], rows, q_heads=2 * group, k_dim=k_dim, device=device))


@pytest.mark.parametrize("dims", [(16, 64), (80, 24), (64, 7)])
def test_values_of_another_width(device, dims):
    k_dim, v_dim = dims
    check(problem([71, 9], [(0, 70), *prompt(1, 9)], k_dim=k_dim, v_dim=v_dim, device=device))


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 100])
@pytest.mark.parametrize("window", [0, 1, 13, 64, 1000])
def test_block_sizes_and_windows(device, block_size, window):
    rows = [(0, 66), *prompt(1, 30, 20), (2, 0), (2, -1), *prompt(0, 131, 120)]
    check(problem([131, 30, 1], rows, block_size=block_size, device=device), window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_scale(device, softcap, dtype):
    p = problem([90, 5], [(0, 89), *prompt(1, 5)], dtype=dtype, device=device)
    check(p, softcap=softcap, scale=0.7)
    check(p, softcap=softcap, scale=0.7, window=20)


def test_long_prompt(device):
    """Full tiles of rows, blocks of keys that only some rows of a tile read, and their ends."""
    length = 150 if device == "cuda" or effinfer.ops.paged_attention.isa() != "scalar" else 80
    check(problem([length], prompt(0, length), q_heads=2, kv_heads=2, device=device))
    check(problem([length], prompt(0, length), q_heads=3, kv_heads=1, device=device), window=37)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 21])
def test_keys_in_columns_have_the_bits_of_rows(device, kv_dtype, window):
    """Any heads to a strip, dimensions to a tile, and keys to a panel."""
    lengths = [71, 3]
    rows = [(0, 70), *prompt(1, 3), *prompt(0, 67, 62)]
    for q_heads, kv_heads, dim, block_size in (
        (4, 4, 32, 16),
        (7, 7, 80, 48),
        (26, 26, 16, 16),
        (14, 2, 20, 64),
    ):
        shape = {"q_heads": q_heads, "kv_heads": kv_heads, "k_dim": dim, "block_size": block_size}
        p = problem(lengths, rows, **shape, kv_dtype=kv_dtype, columns=False, device=device)
        want = p.run(window=window)
        assert want.isfinite().all()
        assert torch.equal(replace(p, k_pages=in_columns(p.k_pages)).run(window=window), want)
        wide = p.k_pages.new_full((len(p.k_pages), kv_heads + 2, dim + 3, block_size + 5), NAN)
        view = wide[:, 1:-1, 2:-1, 3:-2].permute(0, 3, 1, 2)
        view.copy_(p.k_pages)
        assert torch.equal(replace(p, k_pages=view).run(window=window), want)


def test_planes(device):
    rows = [(0, 40), (0, 40), *prompt(1, 7), (0, 12)]
    p = problem([41, 7], rows, planes=3, device=device)
    out = check(p)
    one = replace(p, k_pages=p.k_pages[2], v_pages=p.v_pages[2], plane=None)
    mine = (p.plane == 2).nonzero().view(-1)
    assert len(mine) > 0
    assert torch.equal(one.rows(mine).run(), out[mine])


def test_large_scores_stay_within_the_stated_bound(device):
    p = problem([200, 3], [(0, 199), (1, 2)], device=device)
    p.q *= 40
    scores = 40 * 16**0.5 * 4
    check(p, bound=1e-6 + 2.5e-7 * scores)
    p.q[:] = 0  # all weights alike
    check(p)


def test_strided_inputs_and_out(device):
    """q and out as slices of fused buffers, k and v as planes of one arena, table as a slice."""
    p = problem([67, 20], [(0, 66), *prompt(1, 20, 15)], k_dim=24, device=device)
    want = p.run()
    rows, heads, dim = p.q.shape
    fused = torch.full((rows, heads + 3, dim), NAN, device=device)
    fused[:, 1 : heads + 1] = p.q
    arena = torch.full((p.k_pages.shape[0], 2, *p.k_pages.shape[1:-1], 30), NAN, device=device)
    arena[:, 0, ..., 3:27], arena[:, 1, ..., 5:29] = p.k_pages, p.v_pages
    wide = torch.full((2, 2, p.block_table.shape[1]), 2**30, dtype=torch.int32, device=device)
    wide[:, 1] = p.block_table
    fused_out = torch.full((rows, heads, 2 * dim), -7.0, device=device)
    view = replace(
        p,
        q=fused[:, 1 : heads + 1],
        k_pages=arena[:, 0, ..., 3:27],
        v_pages=arena[:, 1, ..., 5:29],
        block_table=wide[:, 1],
    )
    out = view.run(out=fused_out[..., dim:])
    assert out.data_ptr() == fused_out[..., dim:].data_ptr()
    assert torch.equal(out, want)
    assert (fused_out[..., :dim] == -7).all()


def test_padding_rows_are_zero(device):
    p = problem([5], [(0, 4), (0, -1), (0, 2)], device=device)
    p.seq_of_row[1] = 99
    out = p.run(out=torch.full_like(p.q, NAN))
    assert (out[1] == 0).all()
    assert torch.equal(out[[0, 2]], p.rows([0, 2]).run())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_row_depends_on_nothing_but_itself(data):
    """Bit for bit: alone, in any order, beside any rows, in chunks, in other pages, on any threads."""
    lengths = data.draw(
        st.lists(st.sampled_from([1, 2, 13, 64, 65, 129, 200]), min_size=1, max_size=3)
    )
    rows = [
        (s, t)
        for s, n in enumerate(lengths)
        for t in range(max(0, n - data.draw(st.sampled_from([1, 4, 20, 70]))), n)
    ]
    shape = {
        "q_heads": data.draw(st.sampled_from([2, 4, 8, 14])),
        "k_dim": data.draw(st.sampled_from([16, 40, 64])),
        "planes": data.draw(st.sampled_from([None, 2])),
    }
    options = {"window": data.draw(st.sampled_from([0, 0, 5, 70]))}
    p = problem(lengths, rows, **shape)
    want = p.run(**options)
    assert want.isfinite().all()

    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    assert torch.equal(p.rows(order).run(**options), want[order])
    cut = data.draw(st.integers(0, len(rows)))
    first, rest = p.rows(torch.arange(cut)), p.rows(torch.arange(cut, len(rows)))
    assert torch.equal(torch.cat([first.run(**options), rest.run(**options)]), want)
    one = data.draw(st.integers(0, len(rows) - 1))
    assert torch.equal(p.rows([one]).run(**options), want[[one]])
    effinfer.set_num_threads(1)
    try:
        assert torch.equal(p.run(**options), want)
    finally:
        effinfer.set_num_threads(0)


@pytest.mark.parametrize("window", [0, 30])
def test_page_layout_and_what_lies_elsewhere_change_no_bit(device, window):
    lengths, rows = [70, 40], [(0, 69), *prompt(1, 40, 30), (0, 68)]
    want = None
    for block_size in (1, 5, 16, 64, 128):
        p = problem(lengths, rows, block_size=1, device=device)
        keys = [p.k_pages[p.block_table[s, :n].long(), 0] for s, n in enumerate(lengths)]
        values = [p.v_pages[p.block_table[s, :n].long(), 0] for s, n in enumerate(lengths)]
        q, p = p.q, problem(lengths, rows, block_size=block_size, device=device, seed=block_size)
        p.q = q
        for s, n in enumerate(lengths):
            t = torch.arange(n, device=device)
            block = p.block_table[s].long()[t // block_size]
            p.k_pages[block, t % block_size] = keys[s]
            p.v_pages[block, t % block_size] = values[s]
        out = p.run(window=window)
        want = out if want is None else want
        assert torch.equal(out, want)


@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_later_tokens_never_touch_a_row(device, poison):
    """Even where a tile reads them for another row: before a window, and after a row's position."""
    p = problem([80], prompt(0, 80, 60), q_heads=2, device=device)
    t = 70
    block, slot = p.block_table[0, t // 16], t % 16
    clean = p.run()
    p.k_pages[block, slot] = poison
    p.v_pages[block, slot] = poison
    out = p.run()
    assert torch.equal(out[:10], clean[:10])
    assert not out[10:].isfinite().all(-1).any()
    block = p.block_table[0, 58 // 16]
    clean = p.run(window=9)
    p.k_pages[block, 58 % 16] = poison
    p.v_pages[block, 58 % 16] = poison
    out = p.run(window=9)
    assert not out[:7].isfinite().all(-1).any()
    assert torch.equal(out[7:10], clean[7:10])


def test_matches_torch(device):
    """One sequence in order is torch's causal attention."""
    n, heads, dim = 75, 4, 32
    p = problem([n], prompt(0, n), q_heads=heads, k_dim=dim, block_size=128, device=device)
    k, v = (pages[p.block_table[0, 0], :n].double() for pages in (p.k_pages, p.v_pages))
    want = torch.nn.functional.scaled_dot_product_attention(
        p.q.double().transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        is_causal=True,
        enable_gqa=True,
    )
    assert_close(p.run(), want.transpose(0, 1))


def test_empty(device):
    p = problem([5], [], device=device)
    assert p.run().shape == (0, 4, 16)
    p = problem([5], [(0, -1)], device=device)
    assert (p.run() == 0).all()


def test_errors(device):
    p = problem([40, 5], [(0, 39), (1, 4)], planes=2, device=device)
    out = torch.zeros_like(p.q)
    cases = [
        (ValueError, "q must have shape", {"q": p.q[0]}),
        (TypeError, "q must be float32 or", {"q": p.q.double()}),
        (ValueError, "q must be contiguous in", {"q": p.q.transpose(1, 2).contiguous().mT}),
        (ValueError, "q must have a multiple of 2 heads", {"q": p.q[:, :3]}),
        (ValueError, "k_pages must have head_dim 16", {"k_pages": p.k_pages[..., :8]}),
        (ValueError, r"k_pages must have shape \(\[planes", {"k_pages": p.k_pages[0, 0]}),
        (ValueError, "k_pages must be contiguous in", {"k_pages": p.k_pages[:, :, :8]}),
        (ValueError, "v_pages must be contiguous in", {"v_pages": in_columns(p.v_pages)}),
        (ValueError, "v_pages must have as many", {"v_pages": p.v_pages[:, 1:]}),
        (ValueError, "block_table must have shape", {"block_table": p.block_table[0]}),
        (TypeError, "block_table must be int32", {"block_table": p.block_table.long()}),
        (ValueError, "seq_of_row must have shape", {"seq_of_row": p.seq_of_row[:1]}),
        (TypeError, "position must be int32", {"position": p.position.long()}),
        (ValueError, "plane must have shape", {"plane": p.plane[:1]}),
    ]
    if p.q.is_cpu:  # a GPU's kernel skips what is out of range

        def spoiled(name, at, value):
            t = getattr(p, name).clone()
            t[at] = value
            return {name: t}

        blocks = p.k_pages.shape[1]
        cases += [
            (ValueError, "block_table must name blocks in", spoiled("block_table", (0, 2), blocks)),
            (ValueError, "block_table must name blocks in", spoiled("block_table", (1, 0), -1)),
            (ValueError, "seq_of_row must be in", spoiled("seq_of_row", 1, 2)),
            (ValueError, "seq_of_row must be in", spoiled("seq_of_row", 0, -1)),
            (ValueError, "position must be below", spoiled("position", 1, 64)),
            (ValueError, "position must be below", spoiled("position", 1, 2**31 - 1)),
            (ValueError, "block_table must name blocks in", spoiled("position", 1, 16)),
            (ValueError, "plane must be in", spoiled("plane", 0, 2)),
        ]
    for error, message, change in cases:
        with pytest.raises(error, match=f"paged_attention: {message}"):
            replace(p, **change).run(out=out)
    options = [
        ("window must be 0 or more", {"window": -1}),
        ("scale must be finite", {"scale": math.inf}),
        ("softcap must be 0 or more", {"softcap": -1.0}),
        ("softcap must be 0 or more", {"softcap": NAN}),
        ("out must have shape", {"out": out[:1]}),
        ("out must not overlap itself", {"out": out[:1].expand_as(out)}),
    ]
    for message, option in options:
        with pytest.raises(ValueError, match=f"paged_attention: {message}"):
            p.run(**option)
    assert (out == 0).all()


def test_registration():
    p = problem([40, 5], [(0, 39), (1, 4)], planes=2)
    args = (*p.args(), p.plane, 0.25, 0, 0.0)
    torch.library.opcheck(torch.ops.effinfer.paged_attention.default, args)
    out = torch.empty_like(p.q)
    torch.library.opcheck(torch.ops.effinfer.paged_attention_out.default, (*args, out))
    compiled = torch.compile(lambda q: replace(p, q=q).run() * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(p.q), p.run() * 2)


def test_no_gradient(device):
    p = problem([4], device=device)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="paged_attention: an input"):
        replace(p, q=p.q.requires_grad_()).run()
