"""A transformers model on the meta device, filled with low-bit layers and floats."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from effinfer.nn.lowbit import LowBitLinear, NormedLowBitLinear
from effinfer.ops.lowbit_weight import LowBitWeight


@contextmanager
def transformers_reads(source: Path) -> Iterator[None]:
    """Turn whatever transformers raises for a configuration it cannot follow into a ValueError."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{source}: not a model: {type(error).__name__}: {error}") from error


def meta_model(source: Path, config: Any) -> Any:
    """The causal language model a transformers configuration describes, without memory."""
    from transformers import AutoModelForCausalLM

    with transformers_reads(source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=torch.float32
        ).eval()


def check_layers(source: Path, layers: object, tensors: int) -> None:
    """Raise ValueError for a number of layers that so many tensors cannot be, before anything is
    built of that many.
    """
    if not isinstance(layers, int) or not 0 <= layers <= tensors:
        raise ValueError(
            f"{source}: the number of layers must be at most its {tensors} tensors, got {layers!r}"
        )


def put_lowbit(
    model: nn.Module,
    name: str,
    weight: LowBitWeight,
    bias: Tensor | None,
    activations: str,
    norm: tuple[float, Tensor] | None = None,
) -> None:
    """Replace the linear layer ``name`` of ``model`` by a low-bit one.

    Args:
        norm: epsilon and weight of BitNet's inner norm, or None.

    Raises:
        ValueError: the weight or bias is not of the layer's shape.
    """
    layer = cast(nn.Linear, model.get_submodule(name))
    expected = (layer.out_features, layer.in_features)
    if tuple(weight.codes.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(weight.codes.shape)}")
    if bias is not None:
        check_float(f"{name}.bias", bias, (layer.out_features,))
        bias = bias.float()
    lowbit = LowBitLinear.from_weight(weight, bias, activations=activations)
    if norm is None:
        model.set_submodule(name, lowbit)
        return
    eps, scale = norm
    check_float(f"{name}.rms_norm.weight", scale, (layer.in_features,))
    normed = NormedLowBitLinear(lowbit, eps)
    normed.norm.weight.copy_(scale)
    model.set_submodule(name, normed.eval())


def put_empty(model: nn.Module, name: str, format: str, group_size: int, activations: str) -> None:
    """Replace the linear layer ``name`` by a low-bit one on the meta device, without weights."""
    layer = cast(nn.Linear, model.get_submodule(name))
    with torch.device("meta"):
        empty = LowBitLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            format=format,
            group_size=group_size,
            activations=activations,
        )
    model.set_submodule(name, empty)


def put_floats(
    model: Any, source: Path, names: Container[str], read: Callable[[str], Tensor]
) -> None:
    """Fill what is left on the meta device: parameters and buffers in ``names`` from ``read``, as
    float32, tied weights from each other, and buffers no checkpoint has as the model computes them.

    Raises:
        ValueError: a tensor is missing from ``source``, or has another shape or dtype.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, old in list(model.state_dict(keep_vars=True).items()):
        if old.is_meta and name in names:
            tensor = read(name)
            check_float(f"{source}: {name}", tensor, tuple(old.shape), old)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            put_tensor(model, name, tensor)
        elif old.is_meta and name not in tied:
            raise ValueError(f"{source}: tensor {name!r} is missing, of shape {tuple(old.shape)}")
    with transformers_reads(source):
        model.tie_weights()
        _compute_buffers(model)


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or buffer ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def check_float(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None
) -> None:
    """Raise ValueError unless ``tensor`` has this shape and is as floating as ``like`` (or so)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    floating = like is None or like.is_floating_point()
    if tensor.is_floating_point() != floating:
        raise ValueError(
            f"{name} must be {'floating point' if floating else 'integer'}, got {tensor.dtype}"
        )


def _compute_buffers(model: Any) -> None:
    """Rotary frequencies and the like, which transformers sets in ``_init_weights``."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # which keeps it from being drawn at random
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
