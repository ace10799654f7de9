"""Layers of signs: ``nn.Linear`` and ``nn.Conv2d`` with one bit per weight and per activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn

from effinfer.ops import binary_conv2d, binary_linear, pack_binary, pack_binary_conv2d

Scale = torch.Tensor | Literal["mean"] | None


class BinaryModule(nn.Module):
    """Buffers of packed signs, with float32 scales that stay float32 when the model is cast."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        cast(Any, super())._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


def _output_scale(layer: str, weight: torch.Tensor, scale: Scale) -> torch.Tensor | None:
    """``scale`` as a tensor ``(N,)``; "mean" is the mean magnitude of each output's weights."""
    if scale is None:
        return None
    if isinstance(scale, str):
        if scale != "mean":
            raise ValueError(
                f"{layer}: weight_scale must be a tensor, 'mean' or None, got {scale!r}"
            )
        return weight.float().abs().flatten(1).mean(1)
    if scale.shape != weight.shape[:1]:
        raise ValueError(
            f"{layer}: weight_scale must have shape {tuple(weight.shape[:1])}, got {tuple(scale.shape)}"
        )
    return scale.detach().float()


def _float_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().float()


class BinaryLinear(BinaryModule):
    """``nn.Linear`` on the signs of its weight and of its input (XNOR-Net, arXiv 1603.05279).

    ``y = ws xs dot(sign x, sign W) + bias``, ``sign`` being -1 below zero and +1 elsewhere.

    Args:
        layer: whose weight's signs and bias are taken; training stays with it.
        weight_scale: ``ws`` ``(N,)``; "mean" for the mean magnitude of each output's weights; None for
            1.
        x_scale: ``xs``; "mean" for the mean magnitude of each row of ``x``; None for 1.
        epilogue: ``none``, ``silu``, ``gelu`` or ``gelu_tanh``.

    Its ``state_dict`` holds the packed signs, the scales and the bias.
    """

    packed: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: nn.Linear,
        *,
        weight_scale: Scale = "mean",
        x_scale: Literal["mean"] | None = None,
        epilogue: str = "none",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.x_scale: Literal["mean"] | None = x_scale
        self.epilogue = epilogue
        weight = layer.weight.detach()
        self.register_buffer("packed", pack_binary(weight))
        self.register_buffer("weight_scale", _output_scale("BinaryLinear", weight, weight_scale))
        self.register_buffer("bias", _float_bias(layer.bias))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return binary_linear(
            x,
            self.packed,
            self.in_features,
            self.out_features,
            self.weight_scale,
            self.bias,
            x_scale=self.x_scale,
            epilogue=self.epilogue,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, x_scale={self.x_scale}, epilogue={self.epilogue}"
        )


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The padding of both sides of each dimension, as numbers."""
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return 0, 0
        around = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(a % 2 for a in around):
            raise ValueError(
                f"BinaryConv2d: padding='same' must be the same on both sides, got kernel "
                f"{layer.kernel_size}"
            )
        return around[0] // 2, around[1] // 2
    return layer.padding[0], layer.padding[1]


class BinaryConv2d(BinaryModule):
    """``nn.Conv2d`` on the signs of its weight and of its input (XNOR-Net, arXiv 1603.05279).

    ``y = ws conv2d(sign(x - threshold), sign W) + bias``, ``sign`` being -1 below zero and +1
    elsewhere. Zero padding is neither sign: padded taps contribute nothing.

    Args:
        layer: whose weight's signs, bias and geometry are taken; one group, padded with zeros.
        weight_scale: ``ws`` ``(N,)``; "mean" for the mean magnitude of each output's weights; None for
            1.
        threshold: ``(C,)``, the learned shift of the sign in ReActNet; None for 0.
        pad_ones: padding is +1 instead of 0.
        epilogue: ``none``, ``silu``, ``gelu`` or ``gelu_tanh``.

    Its ``state_dict`` holds the packed signs, the scales, the thresholds and the bias.

    Raises:
        ValueError: several groups, or a padding that is neither zeros nor symmetric.
    """

    packed: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    threshold: torch.Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d,
        *,
        weight_scale: Scale = "mean",
        threshold: torch.Tensor | None = None,
        pad_ones: bool = False,
        epilogue: str = "none",
    ) -> None:
        super().__init__()
        if layer.groups != 1:
            raise ValueError(f"BinaryConv2d: groups must be 1, got {layer.groups}")
        if layer.padding_mode != "zeros":
            raise ValueError(
                f"BinaryConv2d: padding_mode must be 'zeros', got {layer.padding_mode!r}"
            )
        if threshold is not None and threshold.shape != (layer.in_channels,):
            raise ValueError(
                f"BinaryConv2d: threshold must have shape ({layer.in_channels},), "
                f"got {tuple(threshold.shape)}"
            )
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size = (layer.kernel_size[0], layer.kernel_size[1])
        self.stride = (layer.stride[0], layer.stride[1])
        self.dilation = (layer.dilation[0], layer.dilation[1])
        self.padding, self.pad_ones, self.epilogue = _padding(layer), pad_ones, epilogue
        weight = layer.weight.detach()
        self.register_buffer("packed", pack_binary_conv2d(weight))
        self.register_buffer("weight_scale", _output_scale("BinaryConv2d", weight, weight_scale))
        self.register_buffer("bias", _float_bias(layer.bias))
        self.register_buffer("threshold", _float_bias(threshold))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return binary_conv2d(
            x,
            self.packed,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.weight_scale,
            self.bias,
            threshold=self.threshold,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            pad_ones=self.pad_ones,
            epilogue=self.epilogue,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, pad_ones={self.pad_ones}, epilogue={self.epilogue}"
        )
