"""Layers of integers only: int8 codes in, int8 codes out, as in MLPs of 2-bit weights and activations."""

from __future__ import annotations

import functools

import pytest
import torch
from sklearn.datasets import load_digits

import effinfer
from effinfer.ops import LowBitWeight, lowbit_linear, pack_lowbit
from effinfer.ops.lowbit_weight import FORMATS
from tests.ops.test_lowbit_linear import by_scalar, on, random_weight


def unit_weight(format, n, k):
    """Codes with scale 1 and no group: sums are plain integers."""
    codes = torch.randint(0, FORMATS[format].max_code + 1, (n, k), dtype=torch.uint8)
    return LowBitWeight(format, codes, torch.ones(n, 1), max(k, 1))


@pytest.mark.parametrize("rows", [1, 5, 50])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_in_are_multiplied_exactly(device, format, rows):
    weight = unit_weight(format, 40, 300)
    x = torch.randint(-127, 128, (rows, 300), dtype=torch.int8)
    scale = torch.rand(rows) + 0.1
    packed = on(pack_lowbit(weight), device)
    got = lowbit_linear(x.to(device), packed, x_scale=scale.to(device))
    assert got.dtype is torch.float32
    sums = x.long() @ weight.values().long().t()
    assert torch.equal(got.cpu(), scale[:, None] * sums.float())


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("format", FORMATS)
def test_shifts_round_to_even_and_clamp(device, format, rows):
    """A power-of-two multiplier is a shift; an integer oracle says what it must give."""
    weight = unit_weight(format, 33, 128)
    x = torch.randint(0, 4, (rows, 128), dtype=torch.int8)
    bias = torch.randint(-50, 51, (33,)).float()
    shifts = torch.randint(0, 7, (33,))
    got = lowbit_linear(
        x.to(device), on(pack_lowbit(weight), device), bias.to(device),
        x_scale=torch.ones(rows, device=device),
        requantize=((0.5**shifts).to(device), -8, 7),
    )  # fmt: skip
    sums = x.long() @ weight.values().long().t() + bias.long()
    half, low_bits = (1 << shifts) >> 1, sums & ((1 << shifts) - 1)
    floor = sums >> shifts
    up = (low_bits > half) | ((low_bits == half) & (shifts > 0) & (floor % 2 == 1))
    assert got.dtype is torch.int8
    assert torch.equal(got.cpu().long(), (floor + up.long()).clamp(-8, 7))


@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
def test_requantized_floats(device, epilogue):
    gated = epilogue == "silu_mul"
    parts = [random_weight("int4", 50, 96, 32, zero=True) for _ in range(1 + gated)]
    packed = pack_lowbit(parts[-1], gate_weight=parts[0] if gated else None)
    x, residual, multiplier = torch.randn(7, 96), torch.randn(7, 50), torch.rand(50) * 20
    arguments = {"residual": residual.to(device), "epilogue": epilogue}
    y = lowbit_linear(x.to(device), on(packed, device), **arguments)
    got = lowbit_linear(
        x.to(device), on(packed, device), requantize=(multiplier.to(device), -100, 90), **arguments
    )
    want = (y.cpu() * multiplier).round().clamp(-100, 90).to(torch.int8)
    assert torch.equal(got.cpu(), want)
    if epilogue == "none":
        again = by_scalar(x, packed, residual=residual, requantize=(multiplier, -100, 90))
        assert torch.equal(got.cpu(), again)


def test_nan_becomes_the_lowest_code(device):
    packed = on(pack_lowbit(random_weight("int2", 20, 32)), device)
    x = torch.randn(3, 32, device=device)
    x[1, 3] = torch.nan
    got = lowbit_linear(x, packed, requantize=(torch.ones(20, device=device), -5, 5))
    assert (got[1] == -5).all()
    with effinfer.use_reference():
        assert torch.equal(
            got, lowbit_linear(x, packed, requantize=(torch.ones(20, device=device), -5, 5))
        )


def test_errors(device):
    packed = on(pack_lowbit(random_weight("int2", 20, 32)), device)
    x = torch.zeros(3, 32, dtype=torch.int8, device=device)
    scale, unit = torch.ones(3, device=device), torch.ones(20, device=device)
    with pytest.raises(ValueError, match="lowbit_linear: x_scale must be given with an int8 x"):
        lowbit_linear(x, packed)
    with pytest.raises(ValueError, match="lowbit_linear: x_scale must be given with an int8 x"):
        lowbit_linear(x.float(), packed, x_scale=scale)
    with pytest.raises(ValueError, match=r"lowbit_linear: x_scale must have shape \(3,\)"):
        lowbit_linear(x, packed, x_scale=scale[:2])
    with pytest.raises(ValueError, match="lowbit_linear: activations must be int8 with an int8 x"):
        lowbit_linear(x, packed, x_scale=scale, activations="f32")
    with pytest.raises(ValueError, match="lowbit_linear: activations must be int8 with requantize"):
        lowbit_linear(x.float(), packed, activations="f32", requantize=(unit, 0, 3))
    with pytest.raises(ValueError, match=r"requantize must have -128 <= low <= high <= 127, got 1"):
        lowbit_linear(x, packed, x_scale=scale, requantize=(unit, 1, 0))
    with pytest.raises(ValueError, match=r"lowbit_linear: multiplier must have shape \(20,\)"):
        lowbit_linear(x, packed, x_scale=scale, requantize=(torch.ones(3, device=device), 0, 3))
    if packed.packed.is_cpu:
        x[1, 5] = -128
        with pytest.raises(ValueError, match="lowbit_linear: x must hold codes of -127 to 127"):
            lowbit_linear(x, packed, x_scale=scale)


class _Round(torch.autograd.Function):
    """Rounds forward, the identity backward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class TwoBitLayer(torch.nn.Linear):
    """Weights of 2 bits (-2 to 1 times a scale per output), as a float simulation."""

    def codes(self):
        scale = self.weight.abs().amax(1, keepdim=True).detach() / 2
        return _Round.apply((self.weight / scale).clamp(-2, 1)), scale

    def forward(self, x):
        codes, scale = self.codes()
        return torch.nn.functional.linear(x, codes) * scale[:, 0] + self.bias


def two_bit_activation(x):
    return _Round.apply(x.clamp(0, 3))


@functools.cache
def trained_digits():
    """A 2-bit MLP trained on scikit-learn's digits, and the test images as codes 0 to 3."""
    torch.manual_seed(0)
    digits = load_digits()
    x = two_bit_activation(torch.tensor(digits.data, dtype=torch.float32) * (3 / 16))
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    layers = [TwoBitLayer(64, 128), TwoBitLayer(128, 128), TwoBitLayer(128, 10)]
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], 3e-3)
    with torch.enable_grad():
        for _ in range(120):
            loss = torch.nn.functional.cross_entropy(simulate(layers, x[train]), y[train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layers, x[test], y[test]


def simulate(layers, x):
    for layer in layers[:-1]:
        x = two_bit_activation(layer(x))
    return layers[-1](x)


def test_a_two_bit_mlp_gives_the_simulation_s_labels(device):
    """Weights of 2 bits, activations of 2: label for label, code for code."""
    layers, images, labels = trained_digits()
    want = simulate(layers, images)
    hidden, codes = images, images.to(torch.int8).to(device)
    ones = torch.ones(len(images), device=device)
    for layer in layers[:-1]:
        values, scale = layer.codes()
        weight = LowBitWeight(
            "int2", (values + 2).to(torch.uint8), scale.detach(), layer.in_features
        )
        unit = torch.ones(layer.out_features, device=device)
        codes = lowbit_linear(
            codes, on(pack_lowbit(weight), device), layer.bias.detach().to(device), x_scale=ones,
            requantize=(unit, 0, 3),
        )  # fmt: skip
        hidden = two_bit_activation(layer(hidden))
        assert torch.equal(codes.cpu().float(), hidden)
    values, scale = layers[-1].codes()
    weight = LowBitWeight("int2", (values + 2).to(torch.uint8), scale.detach(), 128)
    got = lowbit_linear(
        codes, on(pack_lowbit(weight), device), layers[-1].bias.detach().to(device), x_scale=ones
    ).cpu()
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert (got.argmax(1) == labels).float().mean() > 0.85
