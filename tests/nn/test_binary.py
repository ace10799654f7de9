from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effinfer.nn import BinaryConv2d, BinaryLinear
from tests.nn.digits import Sign, digits, train


class SignConv2d(nn.Conv2d):
    """The convolution that BinaryConv2d takes the place of, trainable."""

    def forward(self, x):
        scale = self.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
        y = F.conv2d(Sign.apply(x), Sign.apply(self.weight), None, self.stride, self.padding)
        return y * scale + self.bias.view(-1, 1, 1)


class SignLinear(nn.Linear):
    def forward(self, x):
        scale = self.weight.abs().mean(1) * x.abs().mean(-1, keepdim=True)
        return F.linear(Sign.apply(x), Sign.apply(self.weight)) * scale + self.bias


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16),
        SignConv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32),
        SignConv2d(32, 40, 3, stride=2), nn.BatchNorm2d(40), nn.Flatten(),
        SignLinear(360, 50), nn.BatchNorm1d(50), nn.Linear(50, 10),
    )  # fmt: skip


def native(model):
    """The same network with its sign layers on the native kernels."""
    swapped = [
        BinaryConv2d(layer) if isinstance(layer, SignConv2d)
        else BinaryLinear(layer, x_scale="mean") if isinstance(layer, SignLinear)
        else layer
        for layer in copy.deepcopy(model)
    ]  # fmt: skip
    return nn.Sequential(*swapped).eval()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = network()
    assert train(model, epochs=4) > 0.85
    return model.requires_grad_(False)


def test_a_trained_network_keeps_every_label(trained, device):
    images, _ = digits()
    model = trained
    want = model(images).argmax(1)
    swapped = native(model).to(device)
    assert torch.equal(swapped(images.to(device)).argmax(1).cpu(), want)


def linear_layer():
    return BinaryLinear(nn.Linear(70, 33), x_scale="mean", epilogue="gelu"), torch.randn(4, 70)


def conv_layer():
    conv = nn.Conv2d(20, 33, 3, stride=2, padding="valid", dilation=2)
    return BinaryConv2d(conv, threshold=torch.randn(20)), torch.randn(2, 20, 9, 9)


@pytest.mark.parametrize("make", [linear_layer, conv_layer])
def test_copies_files_and_casts_keep_the_bits(make, tmp_path):
    layer, x = make()
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other, _ = make()
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), want)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), want)
    half = copy.deepcopy(layer).half()
    assert half.weight_scale.dtype is torch.float32  # scales are not rounded by a cast
    assert torch.equal(half(x), want)
    assert half(x.half()).dtype is torch.float16
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(nn.Module.state_dict(wrong_size(layer)))


def wrong_size(layer):
    return (
        BinaryLinear(nn.Linear(70, 90))
        if isinstance(layer, BinaryLinear)
        else BinaryConv2d(nn.Conv2d(20, 90, 3), threshold=torch.zeros(20))
    )


@pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 1)])
@pytest.mark.parametrize("weight_scale", ["mean", None, torch.rand(9)])
def test_a_conv2d_of_any_padding_and_scale(padding, weight_scale):
    conv = nn.Conv2d(5, 9, (3, 5), padding=padding, bias=False)
    x = torch.randn(2, 5, 7, 8)
    scale = torch.ones(9) if weight_scale is None else weight_scale
    if weight_scale == "mean":
        scale = conv.weight.abs().mean((1, 2, 3))
    signs = nn.Conv2d(5, 9, (3, 5), padding=padding, bias=False)
    signs.weight.data = torch.where(conv.weight < 0, -1.0, 1.0)
    want = signs(torch.where(x < 0, -1.0, 1.0)) * scale.view(-1, 1, 1)
    got = BinaryConv2d(conv, weight_scale=weight_scale)(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_residual_joins_last():
    for layer, x in (linear_layer(), conv_layer()):
        y = layer(x)
        residual = torch.randn_like(y)
        assert torch.equal(layer(x, residual), y + residual)


def test_errors():
    with pytest.raises(ValueError, match="BinaryConv2d: groups must be 1, got 2"):
        BinaryConv2d(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="BinaryConv2d: padding_mode must be 'zeros'"):
        BinaryConv2d(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="padding='same' must be the same on both sides"):
        BinaryConv2d(nn.Conv2d(4, 4, 2, padding="same"))
    with pytest.raises(ValueError, match=r"BinaryConv2d: threshold must have shape \(4,\)"):
        BinaryConv2d(nn.Conv2d(4, 4, 3), threshold=torch.zeros(3))
    with pytest.raises(ValueError, match=r"BinaryLinear: weight_scale must have shape \(6,\)"):
        BinaryLinear(nn.Linear(4, 6), weight_scale=torch.ones(4))
    with pytest.raises(ValueError, match="BinaryLinear: weight_scale must be a tensor, 'mean' or"):
        BinaryLinear(nn.Linear(4, 6), weight_scale="max")
