"""Norms reparameterized: the function is the same, and one scale gives the per-channel codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effinfer import fold
from effinfer.fold import Pair
from tests.fold.test_scale import BATCH, bert, difference, gpt2, llama, mamba, outputs


class Block(nn.Module):
    """A norm that two linears read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, 8))
            self.norm.bias.copy_(torch.linspace(-3, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return torch.cat([self.a(y), self.b(y)], -1)


PAIR = Pair("norm", ("a", "b"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_one_scale_are_those_of_a_scale_per_channel(bits: int) -> None:
    model = Block().double().eval()
    x = torch.randn(64, 8, dtype=torch.float64)
    y, before = model.norm(x), model(x)
    low, high = y.amin(0), y.amax(0)
    scales = (high - low) / (2**bits - 1)
    per_channel = (y / scales).round() + (-low / scales).round()
    (folded,) = fold.reparameterize(model, [x], bits=bits, pairs=[PAIR]).folded
    codes = (model.norm(x) / folded.scale).round() + folded.zero
    assert torch.equal(codes, per_channel)
    assert difference(model(x), before) <= 1e-12


@pytest.mark.parametrize("family", [gpt2])
def test_models_with_layer_norms(family) -> None:
    model = family()
    before = outputs(model)
    report = fold.reparameterize(model, [BATCH])
    assert [f.source for f in report.folded] == [
        f"transformer.h.{i}.{norm}" for i in (0, 1) for norm in ("ln_1", "ln_2")
    ]
    assert difference(outputs(model), before) <= 1e-12


@pytest.mark.parametrize("family", [llama, mamba])
def test_rms_norms_take_symmetric_scales_only(family) -> None:
    model = family()
    before = outputs(model)
    report = fold.reparameterize(model, [BATCH])
    assert not report.folded
    assert all("no bias to take the shift" in r.reasons[0] for r in report.refused)
    assert torch.equal(outputs(model), before)
    report = fold.reparameterize(model, [BATCH], symmetric=True)
    assert report.folded
    assert not report.refused
    assert all(f.zero == 0 for f in report.folded)
    assert difference(outputs(model), before) <= 1e-12


def test_post_norms_are_refused() -> None:
    report = fold.reparameterize(bert(), [BATCH])
    assert not report.folded
    assert all("something else reads it" in r.reasons[0] for r in report.refused)


def test_a_channel_that_never_moves_is_left_in_scale() -> None:
    model = Block().double().eval()
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 0.0, 2.0
    x = torch.randn(16, 8, dtype=torch.float64)
    before = model(x)
    assert fold.reparameterize(model, [x], pairs=[PAIR]).folded
    assert difference(model(x), before) <= 1e-12


@pytest.mark.parametrize("bits", [1, 9])
def test_bad_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        fold.reparameterize(llama(), [BATCH], bits=bits)


def test_infinite_activations_are_refused() -> None:
    model = Block().eval()
    ok, bad = torch.randn(2, 8), torch.full((2, 8), float("nan"))
    with pytest.raises(ValueError, match="inputs of a must be finite"):
        fold.reparameterize(model, [ok, bad], pairs=[PAIR])
