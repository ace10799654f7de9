from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effinfer
from effinfer.ops import selective_scan
from tests.conftest import BOUNDS, DTYPES, assert_close

SIGNALS = ("u", "delta", "z")


def make(batch=2, dim=24, state=16, length=37, *, groups=0, device="cpu", dtype=torch.float32):
    """Arguments as a Mamba layer has them: time-major memory, decays from strong to weak."""
    torch.manual_seed(1000 * dim + length)

    def time_major(*shape):
        return torch.randn(*shape, device=device).to(dtype).movedim(1, -1)

    matrix = (batch, length, groups, state) if groups else (batch, length, state)
    b, c = (torch.randn(matrix, device=device).to(dtype).movedim(1, -1) for _ in range(2))
    return {
        "u": time_major(batch, length, dim),
        "delta": time_major(batch, length, dim),
        "A": -torch.rand(dim, state, device=device) * 16 - 0.01,
        "B": b,
        "C": c,
        "D": torch.randn(dim, device=device),
        "z": time_major(batch, length, dim),
        "delta_bias": torch.randn(dim, device=device) - 2,
        "delta_softplus": True,
    }


def reference(args, **extra):
    """The float64 reference on the same arguments."""
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    rest = {
        "initial_state": None,
        "cu_seqlens": None,
        "mask": None,
        "reverse": False,
        "num_snapshots": 0,
    }
    rest.update({k: v.double() if k == "initial_state" else v for k, v in extra.items()})
    return selective_scan.reference(*wide.values(), *rest.values())


def check(args, **extra):
    got, want = selective_scan(**args, **extra), reference(args, **extra)
    for g, w in zip(got, want[: len(got)], strict=True):
        assert_close(g, w)
    return got


def cut(args, begin, end):
    """The arguments of positions begin..end."""
    per_position = [k for k in ("B", "C") if args[k].dim() > 2]
    return args | {k: args[k][..., begin:end] for k in (*SIGNALS, *per_position)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "state", "length"),
    [(1, 1, 1, 1), (2, 24, 16, 37), (1, 67, 7, 131), (3, 8, 33, 65), (1, 130, 3, 2), (2, 5, 64, 9)],
)
def test_matches_float64(device, dtype, batch, dim, state, length):
    check(make(batch, dim, state, length, device=device, dtype=dtype))


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
def test_optional_arguments(device, missing):
    check(make(device=device) | {missing: None})


@pytest.mark.parametrize("groups", [1, 3, 24])
def test_grouped(device, groups):
    check(make(groups=groups, device=device))


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_constant(device, constant):
    args = make(device=device)
    check(args | {k: torch.randn(24, 16, device=device) for k in constant})


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_delta_and_A_of_any_sign(device, sign):
    args = make(device=device, length=12) | {"delta_softplus": False, "delta_bias": None}
    check(args | {"A": sign * torch.rand(24, 16, device=device)})


def test_steps_beyond_the_bounded_exponent(device):
    args = make(device=device)
    args["delta"] = args["delta"] * 100
    check(args)


def test_weak_decay(device):
    args = make(1, 16, 16, 300, device=device)
    check(args | {"A": args["A"] * 1e-3})


@pytest.mark.parametrize("layout", ["channel-major", "odd", "every other channel"])
def test_strides_change_no_bits(device, layout):
    args = make(2, 40, 16, 45, device=device)
    want = selective_scan(**args)
    moved = dict(args)
    for name in (*SIGNALS, "B", "C"):
        t = args[name]
        if layout == "channel-major":
            moved[name] = t.contiguous()
        elif layout == "odd":
            moved[name] = torch.randn(2, t.shape[1] + 3, t.shape[2] + 5, device=device)[
                :, 1:-2, 2:-3
            ]
            moved[name].copy_(t)
        else:
            moved[name] = torch.zeros(2, 2 * t.shape[1], t.shape[2], device=device)[:, ::2]
            moved[name].copy_(t)
    for got, w in zip(selective_scan(**moved), want, strict=True):
        assert torch.equal(got, w)


def test_reverse_is_the_flipped_scan(device):
    args = make(device=device)
    flipped = args | {k: args[k].flip(-1) for k in (*SIGNALS, "B", "C")}
    y, last = check(args, reverse=True)
    want, want_last = selective_scan(**flipped)
    assert torch.equal(y, want.flip(-1))
    assert torch.equal(last, want_last)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(0, 90), st.integers(1, 20), st.integers(0, 2**31))
def test_split_anywhere_is_one_shot(length, at, state, seed):
    torch.manual_seed(seed)
    args, at = make(1, 19, state, length), min(at, length)
    start = torch.randn(1, 19, state)
    y, last = selective_scan(**args, initial_state=start)
    y1, middle = selective_scan(**cut(args, 0, at), initial_state=start)
    y2, end = selective_scan(**cut(args, at, length), initial_state=middle)
    assert torch.equal(torch.cat([y1, y2], -1), y)
    assert torch.equal(end, last)


def test_batch_and_threads_change_no_bits():
    args = make(5, 150, 16, 33)
    y, last = selective_scan(**args)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = args | {k: args[k][order] for k in (*SIGNALS, "B", "C")}
    y2, last2 = selective_scan(**shuffled)
    assert torch.equal(y2, y[order])
    assert torch.equal(last2, last[order])
    effinfer.set_num_threads(1)
    try:
        y1, last1 = selective_scan(**args)
    finally:
        effinfer.set_num_threads(0)
    assert torch.equal(y1, y)
    assert torch.equal(last1, last)


def test_varlen(device):
    args = make(1, 24, 16, 80, device=device)
    starts = [0, 0, 5, 70, 70, 80]
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    initial = torch.randn(5, 24, 16, device=device)
    y, last, saved = check(args, cu_seqlens=cu, initial_state=initial, num_snapshots=3)
    for s in range(5):
        alone = selective_scan(
            **cut(args, starts[s], starts[s + 1]), initial_state=initial[s : s + 1], num_snapshots=3
        )
        assert torch.equal(y[..., starts[s] : starts[s + 1]], alone[0])
        assert torch.equal(last[s], alone[1][0])
        assert torch.equal(saved[s], alone[2][0])


@pytest.mark.parametrize("reverse", [False, True])
def test_masked_positions_are_as_if_absent(device, reverse):
    args = make(2, 24, 16, 50, device=device)
    mask = torch.rand(2, 50, device=device) > 0.4
    poisoned = {k: args[k].clone() for k in (*SIGNALS, "B", "C")}
    for t in poisoned.values():
        t.masked_fill_(~mask[:, None], float("nan"))
    initial = torch.randn(2, 24, 16, device=device)
    extra = {"initial_state": initial, "num_snapshots": 4, "reverse": reverse}
    y, last, saved = selective_scan(**(args | poisoned), mask=mask, **extra)
    assert not y[(~mask)[:, None].expand_as(y)].any()
    for row in range(2):
        keep = mask[row]
        kept = args | {k: args[k][row : row + 1][..., keep] for k in (*SIGNALS, "B", "C")}
        alone = selective_scan(**kept, **(extra | {"initial_state": initial[row : row + 1]}))
        assert torch.equal(y[row][:, keep], alone[0][0])
        assert torch.equal(last[row], alone[1][0])
        assert torch.equal(saved[row], alone[2][0])


@pytest.mark.parametrize("length", [0, 2, 40])
def test_a_snapshot_is_the_state_before_the_rejected_tokens(device, length):
    args = make(2, 24, 16, length, device=device)
    initial = torch.randn(2, 24, 16, device=device)
    _, last, saved = selective_scan(**args, initial_state=initial, num_snapshots=5)
    assert torch.equal(saved[:, 0], last)
    for k in range(5):
        kept = cut(args, 0, max(length - k, 0))
        assert torch.equal(saved[:, k], selective_scan(**kept, initial_state=initial)[1])


def test_empty(device):
    initial = torch.randn(2, 24, 16, device=device)
    y, last = selective_scan(**make(length=0, device=device), initial_state=initial)
    assert y.shape == (2, 24, 0)
    assert torch.equal(last, initial)
    assert selective_scan(**make(batch=0, device=device))[1].shape == (0, 24, 16)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e18, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["u", "z", "B"])
def test_adversarial_values(device, name, value):
    args = make(1, 9, 5, 6, device=device) | {"D": None}
    args[name][..., 3] = value
    got, want = selective_scan(**args), reference(args)
    for g, w in zip(got, want[:2], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_errors_name_the_argument(device):
    args = make(device=device)
    with pytest.raises(ValueError, match=r"selective_scan: delta must have shape \(2, 24, 37\)"):
        selective_scan(**(args | {"delta": args["delta"][..., 1:]}))
    with pytest.raises(ValueError, match=r"B must have shape \(24, 16\), \(2, 16, 37\) or"):
        selective_scan(**(args | {"B": args["B"][:, 1:]}))
    with pytest.raises(TypeError, match="u must be float32 or bfloat16 or float16"):
        selective_scan(**(args | {"u": args["u"].double()}))
    with pytest.raises(ValueError, match="num_snapshots must be 0 or more"):
        selective_scan(**args, num_snapshots=-1)
    with pytest.raises(ValueError, match="batch size 1 when cu_seqlens"):
        selective_scan(**args, cu_seqlens=torch.tensor([0, 37], dtype=torch.int32, device=device))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        selective_scan(**(args | {"u": args["u"].clone().requires_grad_()}))


@pytest.mark.parametrize("starts", [[1, 37], [0, 36], [0, 20, 10, 37]])
def test_bad_cu_seqlens(starts):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        selective_scan(**make(batch=1), cu_seqlens=torch.tensor(starts, dtype=torch.int32))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*SIGNALS, "A", "B", "C", "D", "delta_bias"]), st.data())
def test_fuzzed_shapes_are_refused_not_read(name, data):
    shape = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    args = make(1, 6, 4, 8)
    right = {tuple(args[name].shape)} | ({(6, 4)} if name in "BC" else set())
    if name in "BC" and len(shape) == 4 and shape[1] in (1, 2, 3, 6):
        right.add((1, shape[1], 4, 8))
    if tuple(shape) in right or (name == "A" and len(shape) == 2 and shape[0] == 6):
        return
    if name == "u":
        right = set()
    with pytest.raises(ValueError, match="selective_scan: "):
        selective_scan(**(args | {name: torch.randn(shape)}))


def test_registration():
    args = list(make(1, 6, 4, 8).values())
    torch.library.opcheck(
        torch.ops.effinfer.selective_scan.default, (*args, None, None, None, False, 2)
    )
    named = make(1, 6, 4, 8)
    compiled = torch.compile(
        lambda u: selective_scan(**(named | {"u": u}))[0] + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(named["u"]), selective_scan(**named)[0] + 1)


def test_reference_mode_and_bounds():
    args = make(1, 6, 4, 8)
    with effinfer.use_reference():
        y = selective_scan(**args)[0]
    assert_close(y, reference(args)[0], BOUNDS[torch.float32])
    assert selective_scan.isa() in ("scalar", "avx2", "avx512", "neon")
