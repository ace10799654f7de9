from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effinfer.nn import ABBlock, ABShortcut, from_fixed, to_fixed
from tests.nn.digits import Sign, digits, train

GRID = 8  # fractional bits of the floating network's biases and of its first layer's output
FRACTION = 18  # of the fixed point: room for what every slope and mean shifts right


def rounded(x):
    """Rounded to an integer; the gradient passes."""
    return x + (x.round() - x).detach()


def on_grid(x):
    return rounded(x * 2**GRID) / 2**GRID


class FloatBlock(nn.Module):
    """A&B BNN's block in floating point, trained as it will be frozen."""

    def __init__(self, channels, outputs, stride=1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.randn(outputs, channels, 3, 3) * 0.1)
        self.log_gain = nn.Parameter(torch.full((outputs,), -5.0))
        self.b0 = nn.Parameter(torch.zeros(channels))
        self.b1 = nn.Parameter(torch.zeros(outputs))
        self.b2 = nn.Parameter(torch.zeros(outputs))
        self.slope = nn.Parameter(torch.full((outputs,), -3.0))
        if stride == 2:
            self.down = nn.Parameter(torch.randn(outputs, channels, 1, 1) * 0.1)

    def parts(self):
        gain = 2 ** rounded(self.log_gain.clamp(-8, 0))
        return gain, on_grid(self.b1), on_grid(self.b2), rounded(self.slope.clamp(-3, 0))

    def forward(self, x):
        gain, b1, b2, slope = (p.to(x.dtype).view(-1, 1, 1) for p in self.parts())
        signs = Sign.apply(x + self.b0.to(x.dtype).view(-1, 1, 1))
        weight = Sign.apply(self.weight).to(x.dtype)
        y = F.conv2d(signs, weight, stride=self.stride, padding=1) * gain
        if self.stride == 2:
            x = F.conv2d(F.avg_pool2d(x, 2), Sign.apply(self.down).to(x.dtype)) / 4
        y = y + x + b1
        return torch.where(y < 0, y * 2**slope, y) + b2

    def frozen(self):
        gain, b1, b2, slope = self.parts()
        shortcut = ABShortcut(self.down, torch.full_like(gain, 0.25)) if self.stride == 2 else None
        return ABBlock(
            self.weight, gain=gain, threshold=-self.b0, pre_bias=b1, slope_exponent=slope,
            post_bias=b2, fraction_bits=FRACTION, stride=self.stride, padding=1, shortcut=shortcut,
        )  # fmt: skip


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(FloatBlock(16, 16), FloatBlock(16, 32, stride=2))
        self.last = nn.Linear(32 * 16, 10)

    def forward(self, x):
        return self.last(self.blocks(on_grid(self.first(x))).flatten(1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Network()
    assert train(model, epochs=5) > 0.85
    return model.requires_grad_(False)


def test_a_trained_network_in_integers_is_the_floating_one(trained, device):
    """Every number between the first and the last layer, so every label, is the same."""
    model = trained
    images, _ = digits()
    start = on_grid(model.first(images)).double()
    want = model.blocks(start)
    native = nn.Sequential(*(block.frozen() for block in model.blocks)).to(device)
    got = native(to_fixed(start, FRACTION).to(device))
    assert got.dtype is torch.int32
    numbers = from_fixed(got.cpu(), FRACTION, torch.float64)
    assert torch.equal(numbers, want)
    last = copy.deepcopy(model.last).double()
    labels = last(numbers.flatten(1)).argmax(1)
    assert torch.equal(labels, last(want.flatten(1)).argmax(1))
    assert torch.equal(labels, model(images).argmax(1))  # the float32 network's too


def random_block(fraction_bits=12, shortcut=None, **changes):
    arguments = {
        "gain": torch.rand(40) * 0.2 + 0.01, "threshold": torch.randn(20),
        "pre_bias": torch.randn(40), "slope_exponent": torch.randint(-5, 1, (40,)).float(),
        "post_bias": torch.randn(40), "fraction_bits": fraction_bits, "padding": 1,
        "shortcut": shortcut,
    }  # fmt: skip
    return ABBlock(torch.randn(40, 20, 3, 3), **arguments | changes)


def identity_shortcut():
    return ABShortcut(torch.randn(40, 20, 1, 1), torch.full((40,), 0.25), pool=1)


@pytest.mark.parametrize("fraction_bits", [8, 12, 16])
@pytest.mark.parametrize("pad_ones", [False, True])
def test_error_bound(device, fraction_bits, pad_ones):
    """Against the floating block, gains and biases as they were before freezing."""
    torch.manual_seed(fraction_bits)
    weight, gain = torch.randn(20, 20, 3, 3), (torch.rand(20) * 0.2 + 0.01) * torch.randn(20).sign()
    threshold, b1, b2 = torch.randn(3, 20)
    slope = torch.randint(-5, 1, (20,)).float()
    block = ABBlock(
        weight, gain=gain, threshold=threshold, pre_bias=b1, slope_exponent=slope, post_bias=b2,
        fraction_bits=fraction_bits, padding=1, pad_ones=pad_ones,
    ).to(device)  # fmt: skip
    fixed = to_fixed(torch.randn(4, 20, 9, 9), fraction_bits)
    x = from_fixed(fixed, fraction_bits, torch.float64)
    signs = torch.where(x < threshold.double().view(-1, 1, 1), -1.0, 1.0).double()
    padded = F.pad(signs, (1, 1, 1, 1), value=float(pad_ones))
    dot = F.conv2d(padded, torch.where(weight < 0, -1.0, 1.0).double())
    y = dot * gain.double().view(-1, 1, 1) + x + b1.double().view(-1, 1, 1)
    y = torch.where(y < 0, y * 2 ** slope.double().view(-1, 1, 1), y) + b2.double().view(-1, 1, 1)
    got = from_fixed(block(fixed.to(device)).cpu(), fraction_bits, torch.float64)
    bound = block.error_bound().cpu().view(-1, 1, 1)
    assert ((got - y).abs() <= bound + 1e-12).all()
    # The frozen block's own float64 differs by what a right shift drops, and by nothing else.
    dropped = block.reference(x.to(device)).cpu() - got
    assert ((dropped >= 0) & (dropped < 2.0**-fraction_bits)).all()


def test_thresholds_between_grid_points_are_exact(device):
    threshold = torch.tensor([0.0, 0.25, 0.3, -0.3, 1e-9, -1e-9])
    weight = torch.eye(6).view(6, 6, 1, 1) * 2 - 1  # +1 on the diagonal, -1 elsewhere
    block = ABBlock(
        weight, gain=torch.ones(6), threshold=threshold, pre_bias=torch.zeros(6),
        slope_exponent=torch.zeros(6), post_bias=torch.zeros(6), fraction_bits=2,
    ).to(device)  # fmt: skip
    fixed = torch.arange(-3, 4, dtype=torch.int32).view(7, 1, 1, 1).expand(7, 6, 1, 1).contiguous()
    want = block.reference(from_fixed(fixed, 2, torch.float64).to(device)).cpu()
    signs = torch.where(fixed.double() / 4 < threshold.double().view(6, 1, 1), -1.0, 1.0).double()
    exact = F.conv2d(signs, weight.double()) + fixed.double() / 4
    assert torch.equal(want, exact)
    assert torch.equal(from_fixed(block(fixed.to(device)).cpu(), 2, torch.float64), exact)


@pytest.mark.parametrize("pool", [1, 2])
def test_shortcut_rounds_down_once(pool):
    shortcut = ABShortcut(torch.randn(9, 7, 1, 1), torch.tensor([0.1, -0.3, 1.0] * 3), pool)
    fixed = torch.randint(-9999, 9999, (2, 7, 6, 4), dtype=torch.int32)
    dropped = shortcut.reference(fixed) - shortcut(fixed)
    assert ((dropped >= 0) & (dropped < 1)).all()
    assert shortcut(fixed).shape == (2, 9, 6 // pool, 4 // pool)


def test_copies_files_and_compile_keep_the_bits(tmp_path):
    block = random_block(shortcut=identity_shortcut())
    x = to_fixed(torch.randn(2, 20, 5, 5), 12)
    want = block(x)
    assert torch.equal(copy.deepcopy(block)(x), want)
    torch.save(block.state_dict(), tmp_path / "state.pt")
    other = random_block(shortcut=identity_shortcut())
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), want)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), want)
    assert torch.equal(block.half()(x), want)


def test_fixed_point():
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, float("nan"), float("inf"), -1e30])
    limit = 1 << 29
    assert to_fixed(x, 0).tolist() == [0, 0, 2, 2, 0, limit, -limit]
    fixed = torch.randint(-limit, limit, (100,), dtype=torch.int32)
    assert torch.equal(to_fixed(from_fixed(fixed, 7, torch.float64), 7), fixed)


def test_errors():
    ones = torch.ones(40)
    for name, value, message in [
        ("gain", ones * 2.0**-13, "fraction_bits must be at least 13 for these gains, got 12"),
        ("gain", ones * 2.0**12, "fraction_bits must be at most 9 for these gains, got 12"),
        ("gain", ones * 0, "gain must not be 0"),
        ("gain", ones[:3], r"gain must have shape \(40,\), got \(3,\)"),
        ("threshold", ones[:20] / 0, "threshold must be finite"),
        ("slope_exponent", ones * 1.0, r"slope_exponent must be integers in \[-31, 0\]"),
        ("slope_exponent", ones * -0.5, r"slope_exponent must be integers in \[-31, 0\]"),
        ("pre_bias", ones * 1e6, r"pre_bias must be within \+-268435456 in fixed point"),
        ("fraction_bits", 25, r"fraction_bits must be in \[0, 24\], got 25"),
    ]:
        with pytest.raises(ValueError, match=f"ABBlock: {message}"):
            random_block(**{name: value})
    with pytest.raises(ValueError, match="binary_conv2d_fixed: residual must have shape"):
        random_block()(torch.zeros(1, 20, 4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="ABShortcut: pool must be 1 or 2, got 3"):
        ABShortcut(torch.ones(1, 1, 1, 1), torch.ones(1), pool=3)
    with pytest.raises(ValueError, match="ABShortcut: gain must be in"):
        ABShortcut(torch.ones(1, 1, 1, 1), torch.ones(1) * 8)
