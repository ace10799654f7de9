from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import effinfer
from effinfer.ops import rope_write
from tests.conftest import BOUNDS, DTYPES, assert_close


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def inputs(rows=5, q_heads=4, kv_heads=2, k_dim=16, v_dim=None, rotary=None, blocks=3, block_size=4,
           dtype=torch.float32, page_dtype=None, device="cpu", seed=0):  # fmt: skip
    """qkv, cos, sin and pages full of -7, for distinct slots from the last one down."""
    g = torch.Generator().manual_seed(seed)
    v_dim = v_dim or k_dim
    rotary = k_dim if rotary is None else rotary
    width = (q_heads + kv_heads) * k_dim + kv_heads * v_dim
    angle = torch.rand(rows, rotary, generator=g) * 6
    pages = [
        torch.full((blocks, block_size, kv_heads, dim), -7.0, dtype=page_dtype or dtype)
        for dim in (k_dim, v_dim)
    ]
    slot = torch.arange(blocks * block_size - 1, -1, -1, dtype=torch.int32)[:rows]
    args = [torch.randn(rows, width, generator=g).to(dtype), angle.cos(), angle.sin(), *pages, slot]
    return [t.to(device) for t in args], {"q_heads": q_heads, "kv_heads": kv_heads}


def copies(args):
    return [t.clone() if torch.is_tensor(t) else t for t in args]


def check(args, **options):
    """The op and its reference in float64 leave the same in every tensor."""
    args, want = list(args), copies(args)
    for i in (0, 3, 4):
        want[i] = want[i].double()
    dtype = args[0].dtype
    rope_write(*args, **options)
    plane, position = options.pop("plane", None), options.pop("position", None)
    heads, interleaved = (
        (options["q_heads"], options["kv_heads"]),
        options.get("interleaved", False),
    )
    rope_write.reference(*want, position, plane, *heads, interleaved)
    for i in (0, 3, 4):
        bound = max(BOUNDS[dtype], BOUNDS[args[i].dtype])
        assert_close(args[i], want[i], bound)
    return args


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_matches_float64(device, dtype, page_dtype, interleaved):
    args, heads = inputs(dtype=dtype, page_dtype=page_dtype, device=device)
    check(args, **heads, interleaved=interleaved)


@pytest.mark.parametrize(
    "dims", [(16, 16), (64, 64), (80, 80), (96, 24), (128, 32), (20, 6), (2, 2)]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_head_and_rotary_dims(device, dims, interleaved):
    k_dim, rotary = dims
    args, heads = inputs(k_dim=k_dim, v_dim=k_dim + 3, rotary=rotary, device=device)
    check(args, **heads, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_float32_has_the_bits_of_transformers(device, interleaved):
    rows, q_heads, kv_heads, dim = 9, 6, 2, 32
    args, heads = inputs(rows, q_heads, kv_heads, dim, device=device)
    config = LlamaConfig(hidden_size=q_heads * dim, num_attention_heads=q_heads)
    position = torch.arange(700, 700 + rows)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), position[None])
    if interleaved:  # Cohere's tables: an entry per pair, twice in a row
        cos, sin = (t[..., : dim // 2].repeat_interleave(2, -1) for t in (cos, sin))
    cos, sin = cos.to(device), sin.to(device)
    q, k, v = args[0].clone().split([q_heads * dim, kv_heads * dim, kv_heads * dim], 1)
    q, k = (t.view(1, rows, -1, dim).transpose(1, 2) for t in (q, k))
    q, k = (cohere_rotary if interleaved else apply_rotary_pos_emb)(q, k, cos, sin)
    q, k = (t.transpose(1, 2)[0] for t in (q, k))
    args[1:3] = cos[0], sin[0]
    rope_write(*args, **heads, interleaved=interleaved)
    equal = torch.equal if device == "cpu" else torch.allclose  # a GPU's torch may fuse
    assert equal(args[0], torch.cat([q.flatten(1), k.flatten(1), v], 1))
    slot = args[5].long()
    assert torch.equal(
        args[3].flatten(0, 1)[slot], args[0].view(rows, -1, dim)[:, q_heads:-kv_heads]
    )
    assert torch.equal(args[4].flatten(0, 1)[slot], v.view(rows, kv_heads, dim))


def test_tables_by_position(device):
    args, heads = inputs(rows=4, device=device)
    position = int32(3, 0, 3, -1, device=device)
    want = copies(args)
    rows = [3, 0, 3]
    want = [want[0][:3], want[1][rows], want[2][rows], *want[3:5], want[5][:3]]
    rope_write(*want, **heads)
    before = args[0].clone()
    check(copies(args), position=position, **heads)
    rope_write(*args, position=position, **heads)
    assert torch.equal(args[0][:3], want[0])
    assert torch.equal(args[0][3], before[3])


def test_no_rotation(device):
    args, heads = inputs(device=device)
    before = args[0].clone()
    args[1] = args[2] = None
    rope_write(*args, **heads)
    assert torch.equal(args[0], before)
    assert torch.equal(args[4].flatten(0, 1)[args[5].long()].flatten(1), before[:, -32:])


def test_planes_and_rows_that_write_nothing(device):
    """Only the named slots change; a negative slot is nowhere, and its plane may be anything."""
    args, heads = inputs(rows=4, device=device)
    for i in (3, 4):
        args[i] = torch.stack([args[i], args[i], args[i]])
    args[5] = int32(5, -1, 5, 11, device=device)
    plane = int32(2, 99, 0, 2, device=device)
    k_pages, v_pages = args[3:5]
    rope_write(*args, plane=plane, **heads)
    for pages in (k_pages, v_pages):
        changed = (pages != -7).flatten(1, 2).any(-1).any(-1).nonzero()
        assert changed.tolist() == [[0, 5], [2, 5], [2, 11]]
    assert torch.equal(k_pages[2].flatten(0, 1)[11].flatten(), args[0][3, 64:96])


@pytest.mark.parametrize("page_dtype", DTYPES)
def test_keys_in_columns(device, page_dtype):
    """Positions side by side in memory; and a slice of such pages, whose surroundings stay."""
    args, heads = inputs(k_dim=20, block_size=16, page_dtype=page_dtype, device=device)
    want = copies(args)
    rope_write(*want, **heads)
    k_pages = args[3].movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.full((3, 4, 23, 19), -7.0, dtype=page_dtype, device=device)
    view = wide[:, 1:3, 2:22, 1:17].permute(0, 3, 1, 2)
    for pages in (k_pages, view):
        rope_write(args[0].clone(), *args[1:3], pages, *args[4:], **heads)
        assert torch.equal(pages, want[3])
    view.fill_(-7)
    assert (wide == -7).all()


def test_strided(device):
    """qkv as a slice of wider rows, cos and sin of one table, k and v of one arena."""
    args, heads = inputs(device=device)
    want = copies(args)
    rope_write(*want, **heads)
    qkv = torch.full((5, args[0].shape[1] + 9), -7.0, device=device)
    table = torch.cat(args[1:3], 1)
    arena = torch.full((3, 4, 2, 2, 20), -7.0, device=device)
    view = qkv[:, 4:-5].copy_(args[0])
    k_pages, v_pages = arena[:, :, 0, :, :16], arena[:, :, 1, :, 2:18]
    rope_write(view, table[:, :16], table[:, 16:], k_pages, v_pages, args[5], **heads)
    for got, right in zip((view, k_pages, v_pages), (want[0], *want[3:5]), strict=True):
        assert torch.equal(got, right)
    assert (arena[:, :, 0, :, 16:] == -7).all()
    assert (qkv[:, :4] == -7).all()


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9))
def test_rows_do_not_depend_on_each_other(order, cut):
    args, heads = inputs(rows=9, k_dim=20, rotary=12)
    want = copies(args)
    rope_write(*want, **heads)
    effinfer.set_num_threads(1)
    try:
        for part in (order[:cut], order[cut:]):
            rows = [args[i][part] for i in (0, 1, 2)]
            rope_write(*rows, *args[3:5], args[5][part], **heads)
            assert torch.equal(rows[0], want[0][part])
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(args[3], want[3])
    assert torch.equal(args[4], want[4])


def test_empty(device):
    args, heads = inputs(rows=0, device=device)
    rope_write(*args, **heads)
    assert (args[3] == -7).all()


def test_errors_change_nothing(device):
    args, heads = inputs(device=device)
    qkv, cos, sin, k_pages, v_pages, slot = args
    before = copies(args)
    cases = [
        (ValueError, "qkv must have shape", 0, qkv[0]),
        (ValueError, "qkv must have rows of", 0, qkv[:, :-1]),
        (TypeError, "qkv must be float32 or", 0, qkv.double()),
        (ValueError, "qkv must not overlap itself", 0, qkv[:1].expand_as(qkv)),
        (ValueError, "cos must have 5 rows", 1, cos[:4]),
        (TypeError, "cos must be float32", 1, cos.double()),
        (ValueError, "cos must have an even number", 1, cos[:, :3]),
        (ValueError, "cos must have an even number", 1, torch.cat([cos, cos], 1)),
        (ValueError, "sin must have 5 rows of 16", 2, sin[:, :8]),
        (ValueError, "sin must be given exactly", 2, None),
        (ValueError, "k_pages must have shape", 3, k_pages[0]),
        (ValueError, "v_pages must have as many", 4, v_pages[:1]),
        (ValueError, "slot must have shape", 5, slot[:1]),
        (TypeError, "slot must be int32", 5, slot.long()),
    ]
    if qkv.is_cpu:  # a GPU's kernel skips what is out of range
        cases += [
            (ValueError, r"slot must be in \[0, 12\)", 5, int32(0, 1, 2, 3, 12)),
            (ValueError, "slot must not repeat", 5, int32(0, 1, -1, 3, 1)),
        ]
    for error, message, at, value in cases:
        with pytest.raises(error, match=f"rope_write: {message}"):
            rope_write(*[value if i == at else t for i, t in enumerate(args)], **heads)
    options = [("q_heads", 3, "qkv must have"), ("kv_heads", 1, "kv_heads must be")]
    if qkv.is_cpu:
        options += [
            ("position", int32(0, 1, 2, 3, 5), "position must be in"),
            ("plane", int32(0, 0, 0, 0, 1), "plane must be in"),
        ]
    for name, value, message in options:
        with pytest.raises(ValueError, match=f"rope_write: {message}"):
            rope_write(*args, **(heads | {name: value}))
    for t, old in zip(args, before, strict=True):
        assert torch.equal(t, old)


def test_registration():
    args, heads = inputs()
    rest = (None, None, *heads.values(), False)
    torch.library.opcheck(torch.ops.effinfer.rope_write.default, (*args, *rest))

    def step(qkv, k_pages, v_pages):
        rope_write(qkv, *args[1:3], k_pages, v_pages, args[5], **heads)
        return qkv * 2

    want = copies(args)
    rope_write(*want, **heads)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(args[0], *args[3:5]), want[0] * 2)
    assert torch.equal(args[3], want[3])


def test_no_gradient(device):
    args, heads = inputs(device=device)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="rope_write: an input"):
        rope_write(args[0].requires_grad_(), *args[1:], **heads)
