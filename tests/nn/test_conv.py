"""The convolution's state after padding, against dropping the masked tokens by hand."""

from __future__ import annotations

import pytest
import torch

from effinfer.nn.conv import convolve, last_real_columns


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("with_initial", [False, True])
def test_last_real_columns_are_those_of_the_shortened_rows(length: int, with_initial: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(6, 3, length, generator=generator)
    mask = torch.rand(6, length, generator=generator) < 0.5
    mask[0], mask[1] = True, False
    initial = torch.randn(6, 3, 4, generator=generator) if with_initial else None
    got = last_real_columns(x, mask, initial, 4)
    for row in range(6):
        before = torch.zeros(3, 4) if initial is None else initial[row]
        want = torch.cat([before, x[row][:, mask[row]]], dim=1)[:, -4:]
        assert torch.equal(got[row], want)


def test_right_padding_continues_as_if_it_were_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 12, generator=generator)
    weight, bias = torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)
    mask = torch.arange(9)[None] < 6
    padded = torch.cat([x[:, :, :6], torch.randn(1, 8, 3, generator=generator)], dim=2)
    _, state = convolve(padded, weight, bias, "silu", None, mask)
    tail, _ = convolve(x[:, :, 6:], weight, bias, "silu", state, None)
    whole, _ = convolve(x, weight, bias, "silu", None, None)
    torch.testing.assert_close(tail, whole[:, :, 6:])
