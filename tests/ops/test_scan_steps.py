"""A scan and as many steps have the same bits, so that an engine may mix the two."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from effinfer import ops
from tests.ops.test_selective_state_update import make
from tests.ops.test_ssd import inputs, run, tokens

CUTS = (0, 1, 3, 10, 58, 110)  # steps, a few tokens, more than a chunk
KEPT = 60  # snapshots, into the chunk before the last


def mamba1(length, dim, state, groups):
    """Arguments of both of Mamba-1's ops that do not change with time, and a sequence."""
    args = make(1, dim, state, groups=groups)
    matrix = (1, max(groups, 1), state, length)
    sequence = {name: torch.randn(1, dim, length) for name in ("x", "dt", "z")}
    sequence |= {name: torch.randn(matrix) for name in ("B", "C")}
    return {name: args[name] for name in ("A", "D", "dt_bias")}, sequence, args["state"]


@pytest.mark.parametrize(("dim", "state", "groups"), [(24, 16, 1), (37, 5, 1), (70, 33, 2)])
def test_mamba1(isa, dim, state, groups):
    fixed, sequence, start = mamba1(CUTS[-1], dim, state, groups)

    def scan(first, stop, initial):
        part = {name: t[..., first:stop] for name, t in sequence.items()}
        return ops.selective_scan(
            part["x"], part["dt"], fixed["A"], part["B"], part["C"], fixed["D"], part["z"],
            fixed["dt_bias"], delta_softplus=True, initial_state=initial,
        )  # fmt: skip

    whole, last = scan(0, CUTS[-1], start)
    pieces, now = [], start
    for first, stop in pairwise(CUTS):
        piece, now = scan(first, stop, now)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert torch.equal(now, last)
    stepped, steps = start.clone(), []
    for t in range(CUTS[-1]):
        at = {name: x[..., t] for name, x in sequence.items()}
        steps.append(
            ops.selective_state_update(
                stepped,
                at["x"],
                at["dt"],
                fixed["A"],
                at["B"],
                at["C"],
                fixed["D"],
                at["z"],
                fixed["dt_bias"],
                dt_softplus=True,
            )
        )
    assert torch.equal(torch.stack(steps, 2), whole)
    assert torch.equal(stepped, last)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("dim", "state"), [(12, 20), (16, 32), (5, 16), (3, 300)])
def test_mamba2_one_by_one(device, dim, state, gate):
    a = inputs(2, CUTS[-1], dim=dim, state=state, device=device) | {"chunk_size": 1}
    if not gate:
        a["z"] = None

    def part(first, stop):
        names = [name for name in ("x", "dt", "B", "C", "z") if a[name] is not None]
        return {name: a[name][:, first:stop] for name in names}

    whole, last, snapshots = run(a, num_snapshots=KEPT)
    pieces, now = [], a["initial_state"]
    for first, stop in pairwise(CUTS):
        piece, now = run(a | part(first, stop), initial_state=now)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(now, last)
    stepped, steps = a["initial_state"].clone(), []
    for t in range(CUTS[-1]):
        at = {name: x[:, t] for name, x in part(0, None).items()}
        steps.append(
            ops.ssd_state_update(
                stepped,
                at["x"],
                at["dt"],
                a["A"],
                at["B"],
                at["C"],
                a["D"],
                at.get("z"),
                a["dt_bias"],
                dt_softplus=True,
            )
        )
        back = CUTS[-1] - 1 - t
        if back < KEPT:
            assert torch.equal(snapshots[:, back], stepped)
    assert torch.equal(torch.stack(steps, 1), whole)
    assert torch.equal(stepped, last)


def test_mamba2_one_by_one_restarts_and_passes_over_what_is_masked(device):
    a = inputs(1, 100, device=device) | {"chunk_size": 1}
    ids = (torch.arange(100, device=device)[None] >= 55).int()
    y, last, snapshots = run(a, seq_idx=ids, num_snapshots=3)
    tail = run(tokens(a, 55, 100, initial_state=None), num_snapshots=3)
    for got, want in zip((y[:, 55:], last, snapshots), tail, strict=True):
        assert torch.equal(got, want)
    mask = torch.rand(1, 100, device=device) < 0.7
    real = {name: a[name][mask][None] for name in ("x", "dt", "B", "C", "z")}
    got, want = run(a, mask=mask, num_snapshots=3), run(a | real, num_snapshots=3)
    assert torch.equal(got[0][mask], want[0][0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


def test_convolution(isa):
    x, weight, bias = torch.randn(2, 21, 40), torch.randn(21, 4), torch.randn(21)
    start = torch.randn(2, 21, 3)
    whole, last = ops.causal_conv1d(x, weight, bias, "silu", initial_state=start)[:2]
    state = start.clone()
    steps = [ops.causal_conv1d_update(x[:, :, t], state, weight, bias, "silu") for t in range(40)]
    assert torch.equal(torch.stack(steps, 2), whole)
    assert torch.equal(state, last)
