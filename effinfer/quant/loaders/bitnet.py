"""BitNet b1.58 checkpoints (arXiv 2402.17764) as transformers stores them, and bitnet.cpp's I2_S."""

from __future__ import annotations

import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.loaders.common import (
    FLOATS,
    check_finite,
    check_matrix,
    check_tensor,
    ternary_weight,
)

I2S_TAIL = 32  # bytes after an I2_S tensor's codes: its float32 scale, then padding


def bitnet_weight(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out_features: int,
    linear_class: str = "bitlinear",
    name: str = "bitnet",
) -> LowBitWeight:
    """A packed BitNet layer: ternary, one scale.

    transformers' ``BitLinear`` divides by ``weight_scale``, so the weight is ``value / scale`` as
    float32 rounds it; ``AutoBitLinear`` (offline) multiplies, so it is ``value * scale`` exactly.

    Args:
        weight: ``(ceil(N / 4), K)`` uint8: bits ``2i, 2i + 1`` of row ``r`` are the code of output
            ``i * rows + r``.
        weight_scale: one element, float16, bfloat16 or float32.
        out_features: N.
        linear_class: "bitlinear" or "autobitlinear", from the file's ``quantization_config``.
        name: the layer, for errors.

    Raises:
        ValueError, TypeError: tensors that do not fit together, a scale of 0 or not finite.
    """
    rows, _ = check_matrix(f"{name}.weight", weight, (torch.uint8,))
    if out_features < 1 or rows != -(-out_features // 4):
        raise ValueError(
            f"{name}.weight must have {-(-out_features // 4)} rows for {out_features} outputs, "
            f"got {rows}"
        )
    scale = _single_scale(name, weight_scale)
    if linear_class == "bitlinear":
        if float(scale) == 0:
            raise ValueError(f"{name}.weight_scale must not be 0: weights are divided by it")
        scale = 1 / scale.float()
        check_finite(f"1 / {name}.weight_scale", scale)
    elif linear_class != "autobitlinear":
        raise ValueError(
            f"{name}: linear_class must be 'bitlinear' or 'autobitlinear', got {linear_class!r}"
        )
    codes = torch.cat([(weight >> 2 * i) & 3 for i in range(4)])[:out_features]
    return _one_scale(codes, scale)


def bitnet_online_weight(weight: Tensor, name: str = "bitnet") -> LowBitWeight:
    """A BitNet layer kept as floats ("online"): quantized here as transformers does on each call.

    The scale is ``max(mean |w|, 1e-5)`` and codes are ``round(w / scale)`` cut to -1..1, computed
    as ``WeightQuant`` does, in float32 through the reciprocal: ``.dequantize(weight.dtype)`` has
    its bits.
    """
    check_matrix(f"{name}.weight", weight, FLOATS)
    check_finite(f"{name}.weight", weight)
    weight = weight.float()
    inverse = 1.0 / weight.abs().mean().clamp(min=1e-5)
    codes = (weight * inverse).round().clamp(-1, 1).to(torch.int8) + 1
    return _one_scale(codes.to(torch.uint8), 1 / inverse)


def ternary_float_weight(weight: Tensor, weight_scale: Tensor, name: str) -> LowBitWeight:
    """A BitNet layer whose ternary values are stored unpacked, as -1, 0 and 1 in a float dtype."""
    check_matrix(f"{name}.weight", weight, FLOATS)
    if not bool(torch.isin(weight, torch.tensor([-1, 0, 1], dtype=weight.dtype)).all()):
        raise ValueError(f"{name}.weight must hold -1, 0 and 1 only")
    return _one_scale((weight + 1).to(torch.uint8), _single_scale(name, weight_scale))


def i2s_weight(
    data: Tensor, shape: tuple[int, int], *, block: int = 128, name: str = "i2_s"
) -> LowBitWeight:
    """A tensor of bitnet.cpp's I2_S: ternary codes, then the tensor's float32 scale.

    ``w = scale * (code - 1)``: code ``i`` of a block of ``block`` weights (in row-major order) is
    in byte ``i % (block / 4)``, in bits 6 and 7 for the first quarter down to 0 and 1 for the last.

    Args:
        data: ``(N * K / 4 + 32,)`` uint8, as a GGUF file stores it.
        shape: ``(N, K)``.
        block: 128 for files packed on x86, 64 for files packed on ARM: nothing in a file tells.
        name: the tensor, for errors.

    Raises:
        ValueError, TypeError: sizes that do not fit, a scale that is not finite.
    """
    n, k = shape
    if block not in (64, 128):
        raise ValueError(f"{name}: block must be 64 or 128, got {block}")
    if n < 1 or k < 1 or n * k % block:
        raise ValueError(f"{name} must have a multiple of {block} weights, got shape {shape}")
    check_tensor(name, data, (n * k // 4 + I2S_TAIL,), (torch.uint8,))
    packed = data[: n * k // 4].reshape(-1, block // 4)
    codes = torch.stack([(packed >> shift) & 3 for shift in (6, 4, 2, 0)], dim=1).reshape(n, k)
    scale = data[n * k // 4 :][:4].clone().view(torch.float32)
    check_finite(f"{name}'s scale", scale)
    return _one_scale(codes, scale)


def _single_scale(name: str, weight_scale: Tensor) -> Tensor:
    check_tensor(f"{name}.weight_scale", weight_scale.reshape(-1), (1,), FLOATS)
    check_finite(f"{name}.weight_scale", weight_scale)
    return weight_scale.reshape(())


def _one_scale(codes: Tensor, scale: Tensor) -> LowBitWeight:
    n, k = codes.shape
    return ternary_weight(codes, scale.reshape(1, 1).expand(n, 1).contiguous(), k)
