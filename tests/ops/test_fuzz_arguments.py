"""Every op, with one or two arguments of a good call spoiled: a clear error, or the right result."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer import _native, ops
from effinfer.ops._register import Op


def randn(*shape):
    return torch.randn(shape)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def scan_inputs(batch=1):
    decay, matrix = -torch.rand(6, 4), randn(batch, 4, 9)
    return {"u": randn(batch, 6, 9), "delta": randn(batch, 6, 9), "A": decay, "B": matrix,
            "C": matrix.clone(), "D": randn(6), "z": randn(batch, 6, 9), "delta_bias": randn(6),
            "delta_softplus": True}  # fmt: skip


def scan_options(*state):
    return {"initial_state": randn(3, *state), "cu_seqlens": int32(0, 4, 4, 9),
            "mask": torch.rand(1, 9) > 0.3, "num_snapshots": 2}  # fmt: skip


def lti(kind):
    a, b, c = (torch.rand(6, 4, dtype=kind) * 0.5 for _ in range(3))
    return {"u": randn(1, 6, 9), "A_bar": a, "B_bar": b, "C": c, "D": randn(6), "reverse": True,
            **scan_options(6, 4), "initial_state": torch.rand(3, 6, 4, dtype=kind)}  # fmt: skip


def ssd(batch=1):
    return {"x": randn(batch, 9, 4, 3), "dt": randn(batch, 9, 4), "A": -torch.rand(4),
            "B": randn(batch, 9, 2, 5), "C": randn(batch, 9, 2, 5), "chunk_size": 4, "D": randn(4),
            "z": randn(batch, 9, 4, 3), "dt_bias": randn(4), "dt_softplus": True}  # fmt: skip


def packed_lowbit():
    weight = ops.LowBitWeight("int4", torch.randint(0, 16, (20, 32), dtype=torch.uint8),
                              randn(20, 2), 16, torch.full((20, 2), 3, dtype=torch.uint8),
                              randn(20, 2))  # fmt: skip
    return vars(ops.pack_lowbit(weight))


def paged():
    return {"k_pages": randn(2, 3, 4, 2, 8), "v_pages": randn(2, 3, 4, 2, 8),
            "plane": int32(0, 1, 1)}  # fmt: skip


def lowbit_linear(x, bias, residual, activations, epilogue, **packed):
    return ops.lowbit_linear(x, ops.PackedLowBit(**packed), bias, activations=activations,
                             epilogue=epilogue, residual=residual)  # fmt: skip


# Ops whose arguments are not all plain, called with plain ones.
ASSEMBLED = {"lowbit_linear": lowbit_linear}

# A good call of every op, with as many of its arguments as go together.
CALLS = {
    "binary_conv2d": lambda: {
        "x": randn(2, 5, 4, 3), "packed": ops.pack_binary_conv2d(randn(20, 5, 3, 3)),
        "in_channels": 5, "out_channels": 20, "kernel_size": 3, "weight_scale": torch.rand(20), "bias": randn(20),
        "threshold": randn(5), "stride": 2, "padding": 1, "dilation": 1, "pad_ones": False,
        "residual": randn(2, 20, 2, 2)},
    "binary_linear": lambda: {
        "x": randn(3, 9), "packed": ops.pack_binary(randn(20, 9)), "in_features": 9,
        "out_features": 20, "weight_scale": torch.rand(20), "bias": randn(20),
        "x_scale": torch.rand(3), "residual": randn(3, 20)},
    "causal_conv1d": lambda: {"x": randn(1, 6, 9), "weight": randn(6, 4), "bias": randn(6),
                              "activation": "silu", "dilation": 1, **scan_options(6, 3)},
    "causal_conv1d_update": lambda: {"x": randn(3, 6), "conv_state": randn(5, 6, 3),
                                     "weight": randn(6, 4), "bias": randn(6), "dilation": 1,
                                     "state_indices": int32(4, -1, 0)},
    "gated_rms_norm": lambda: {"x": randn(3, 8), "weight": randn(8), "z": randn(3, 8), "eps": 1e-5,
                               "group_size": 4},
    "hidden_attention": lambda: {k: v for k, v in scan_inputs(2).items() if k not in ("u", "D", "z")},
    "layer_norm": lambda: {"x": randn(3, 8), "weight": randn(8), "bias": randn(8), "eps": 1e-5,
                           "residual": randn(3, 8)},
    "linear": lambda: {"x": randn(3, 8), "packed": ops.pack_linear(randn(20, 8)),
                       "out_features": 20, "bias": randn(20), "residual": randn(3, 20)},
    "lowbit_linear": lambda: {"x": randn(3, 32), **packed_lowbit(), "bias": randn(20),
                              "residual": randn(3, 20), "activations": "int8",
                              "epilogue": "none"},
    "low_rank_add": lambda: {
        "y": randn(3, 20), "x": randn(3, 8), "index": int32(0, 2, 2), "down": randn(3, 5, 8),
        "up": randn(3, 16 * 3 + 16 * 2), "bias": randn(3, 20), "parts": (12, 3, 8, 2)},
    "moe_experts": lambda: {
        "x": randn(3, 8), "index": int32(0, 2, 2, 1, 1, 0).view(3, 2), "weights": torch.rand(3, 2),
        "up": ops.pack_experts(randn(3, 20, 8)), "down": ops.pack_experts(randn(3, 8, 10))},
    "paged_attention": lambda: {
        "q": randn(3, 4, 8), **paged(), "block_table": int32(2, 0, 1, 1).view(2, 2),
        "seq_of_row": int32(0, 0, 1), "position": int32(5, 2, 7), "scale": 0.3, "window": 4,
        "softcap": 20.0},
    "rms_norm": lambda: {"x": randn(3, 8), "weight": randn(8), "eps": 1e-5,
                         "residual": randn(3, 8)},
    "rope_write": lambda: {
        "qkv": randn(3, 64), "cos": torch.rand(3, 6), "sin": torch.rand(3, 6), **paged(),
        "slot": int32(4, 11, 0), "position": int32(2, 0, 2), "q_heads": 4, "kv_heads": 2,
        "interleaved": False},
    "selective_scan": lambda: {**scan_inputs(), **scan_options(6, 4)},
    "selective_scan_lmu": lambda: {"u": randn(2, 6, 9), "A_bar": randn(4, 4) * 0.3,
                                   "B_bar": randn(4), "initial_state": randn(2, 6, 4),
                                   "num_snapshots": 2},
    "selective_scan_lti": lambda: lti(torch.complex64),
    "selective_state_update": lambda: {
        "state": randn(5, 6, 4), "x": randn(3, 6), "dt": randn(3, 6), "A": -torch.rand(6, 4),
        "B": randn(3, 4), "C": randn(3, 4), "D": randn(6), "z": randn(3, 6), "dt_bias": randn(6),
        "dt_softplus": True, "state_indices": int32(4, -1, 0)},
    "silu_mul": lambda: {"gate": randn(3, 8), "up": randn(3, 8)},
    "softmax_top2": lambda: {"logits": randn(3, 9)},
    "ssd": lambda: {**ssd(), **scan_options(4, 3, 5)},
    "ssd_state_update": lambda: {
        "state": randn(5, 4, 3, 5), "x": randn(3, 4, 3), "dt": randn(3, 4), "A": -torch.rand(4),
        "B": randn(3, 2, 5), "C": randn(3, 2, 5), "D": randn(4), "z": randn(3, 4, 3),
        "dt_bias": randn(4), "dt_softplus": True, "state_indices": int32(4, -1, 0)},
    "state_copy": lambda: {"dst": randn(5, 6, 4), "dst_indices": int32(4, -1, 0),
                           "src": randn(7, 6, 4), "src_indices": int32(1, 2, 6)},
}  # fmt: skip

# Other forms of the same ops, for what does not go together.
FORMS = [
    *CALLS.items(),
    (
        "binary_conv2d_fixed",
        lambda: {
            "x": torch.randint(-9, 9, (2, 5, 4, 3), dtype=torch.int32),
            "threshold": int32(0, 1, 2, 3, 4),
            "packed": ops.pack_binary_conv2d(randn(20, 5, 3, 3)),
            "out_channels": 20,
            "kernel_size": 3,
            "gain_shift": int32(*[2] * 20),
            "pre_bias": int32(*range(20)),
            "slope_shift": int32(*[3] * 20),
            "post_bias": int32(*range(20)),
            "padding": 1,
            "residual": torch.randint(-9, 9, (2, 20, 4, 3), dtype=torch.int32),
        },
    ),
    ("paged_attention", lambda: CALLS["paged_attention"]() | {"out": torch.zeros(3, 4, 8)}),
    ("selective_scan", lambda: scan_inputs(2)),
    ("selective_scan_lti", lambda: lti(torch.float32)),
    ("selective_scan_lmu", lambda: CALLS["selective_scan_lmu"]() | {"last_only": True}),
    ("ssd", lambda: ssd(2) | {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)}),
]


def resized(t, dim, data):
    size = data.draw(st.sampled_from([0, t.shape[dim] - 1, t.shape[dim] + 1]))
    return t.index_select(dim, torch.arange(max(size, 0)) % max(t.shape[dim], 1))


def spoiled_tensor(t, data):
    """Another view, shape, type or content of a tensor; always one torch itself allows."""
    kinds = ["dtype", "rank", "expanded", "strided", "offset", "transposed", "meta", "none"]
    if t.dim() and t.numel() and not t.is_meta:
        kinds += ["size", "size", "value", "value", "overlapping"]
    kind = data.draw(st.sampled_from(kinds))
    if kind == "dtype":
        types = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64,
                 torch.bool, torch.complex64, torch.uint8]  # fmt: skip
        return t.to(data.draw(st.sampled_from(types)))
    if kind == "rank":
        fewer = t[0] if t.dim() and len(t) else t
        return data.draw(
            st.sampled_from([torch.ones((), dtype=t.dtype), t[None], t[..., None], fewer])
        )
    if kind == "expanded":
        return t[..., :1].expand_as(t) if t.dim() and t.shape[-1] else t
    if kind == "strided":
        return torch.stack([t, torch.full_like(t, 1)], -1)[..., 0]
    if kind == "offset":
        return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[-t.numel() or None :].view(t.shape)
    if kind == "transposed":
        return t.t() if t.dim() == 2 else t.movedim(0, -1) if t.dim() else t
    if kind == "meta":
        return t.to("meta")
    if kind == "none":
        return None
    if kind == "size":
        return resized(t, data.draw(st.integers(0, t.dim() - 1)), data)
    if kind == "overlapping":  # rows that share elements
        return t.reshape(-1).as_strided(t.shape, [min(1, s) for s in t.stride()])
    t = t.clone(memory_format=torch.contiguous_format)
    at = data.draw(st.integers(0, t.numel() - 1))
    if t.is_floating_point() or t.is_complex():
        t.view(-1)[at] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 2.0, -1e-42]))
    elif t.dtype is torch.bool:
        t.view(-1)[at] = not t.view(-1)[at]
    else:
        value = data.draw(st.sampled_from([-(2**31), -2, -1, 0, 3, 4, 5, 100, 2**31 - 1]))
        t.view(-1)[at] = value % 256 if t.dtype is torch.uint8 else value
    return t


def spoiled(value, data):
    if torch.is_tensor(value):
        return spoiled_tensor(value, data)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return data.draw(st.sampled_from(["", "gelu", None]))
    return data.draw(st.sampled_from([-1, 0, 1, 3, 17, math.nan, math.inf, -(2**63), 2**62]))


def copies(args):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in args.items()}


def outcome(name, args):
    """What the op returns and leaves in its arguments, or its error."""
    try:
        result = ASSEMBLED.get(name, getattr(ops, name))(**args)
    except Exception as error:
        return error
    results = result if isinstance(result, tuple) else (result,)
    return [*results, *(v for v in args.values() if torch.is_tensor(v))]


def same(a, b):
    """``a`` is close to ``b`` wherever ``b`` is finite: which infinity meets which depends on the order
    of a sum, and a kernel may skip what the reference multiplies by zero."""
    if a is None or a.is_meta:
        return b is None or b.is_meta
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = b.isfinite()
    close = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(a.dtype, 1e-4)
    return torch.allclose(a[finite], b[finite], rtol=close, atol=close)


def bits(t):
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_clear_error_or_the_right_result(form, data):
    name, build = form
    torch.manual_seed(0)
    args = build()
    for key in data.draw(st.lists(st.sampled_from(list(args)), min_size=1, max_size=2)):
        if args[key] is not None:
            args[key] = spoiled(args[key], data)
    before = copies(args)
    got = outcome(name, args)
    if not isinstance(got, Exception):
        with effinfer.use_reference():
            want = outcome(name, before)
        assert not isinstance(want, Exception), f"accepted, but the reference says: {want}"
        for g, w in zip(got, want, strict=True):
            assert same(g, w)
        return
    known = (ValueError, TypeError, RuntimeError, effinfer.BackendUnavailableError)
    assert isinstance(got, known), repr(got)
    no_device = isinstance(got, effinfer.BackendUnavailableError) and "no kernels" in str(got)
    # A 4-dimensional state makes the one update the other.
    names = [name, name.replace("selective_state", "ssd_state")]
    assert any(n in str(got) for n in names) or no_device, repr(got)
    for key, value in args.items():
        if torch.is_tensor(value) and not value.is_meta:
            assert torch.equal(bits(value), bits(before[key])), f"{key} changed"


def test_every_op_is_here():
    assert set(CALLS) == set(_native.module("_C").kernels())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_the_calls_are_good(form):
    name, build = form
    torch.manual_seed(0)
    args = build()
    before = copies(args)
    got = outcome(name, args)
    with effinfer.use_reference():
        want = outcome(name, before)
    assert not isinstance(got, Exception), repr(got)
    for g, w in zip(got, want, strict=True):
        assert same(g, w)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_one_meta_tensor_is_refused_by_the_dispatcher_too(form, monkeypatch):
    """torch prefers the fake as soon as one tensor is on meta; its results are memory nobody wrote."""
    monkeypatch.setattr(Op, "__call__", lambda self, *args: self._torch_op(*args))
    name, build = form
    torch.manual_seed(0)
    tensors = [key for key, value in build().items() if torch.is_tensor(value)]
    for key in tensors if len(tensors) > 1 else []:  # a lone one on meta asks for the fake
        args = build()
        args[key] = args[key].to("meta")
        before = copies(args)
        got = outcome(name, args)
        assert isinstance(got, (ValueError, TypeError, RuntimeError)), (key, got)
        names = [name, name.replace("selective_state", "ssd_state")]
        assert any(n in str(got) for n in names), (key, got)
        for argument, value in args.items():
            if torch.is_tensor(value) and not value.is_meta:
                assert torch.equal(bits(value), bits(before[argument])), f"{argument} changed"
