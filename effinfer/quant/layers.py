"""Which layers of a model can be quantized, and why the others can't."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from effinfer.errors import PatchConflictError, UnsupportedModelError
from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.config import QuantConfig
from effinfer.quant.report import SkippedLayer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize. ``names`` are all the places it stands at; it is called by the
    first."""

    names: tuple[str, ...]
    module: nn.Module
    format: str

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def weight(self) -> torch.Tensor:
        """``(N, K)``, whichever way round the module keeps it."""
        return linear_weight(self.module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: a linear layer of a transposed weight."""
    return _is_conv1d_class(type(module))


def _is_conv1d_class(kind: type) -> bool:  # by name: transformers need not be imported
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight ``(N, K)`` of an ``nn.Linear`` or ``Conv1D``, patched ones too."""
    weight = cast(nn.Parameter, module.weight).detach()
    transposed = any(map(_is_conv1d_class, type(module).__mro__))
    return weight.t() if transposed else weight


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be quantized at all.

    Raises:
        TypeError: no module.
        PatchConflictError: quantized already, or patched.
        UnsupportedModelError: in training mode, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    done = [name for name, module in model.named_modules() if isinstance(module, LowBitLinear)]
    if done:
        raise PatchConflictError(
            f"quantize_: the model has {len(done)} low-bit layers already ({done[0]}, ...)"
        )
    if any(hasattr(type(module), "_effinfer_base") for module in model.modules()):
        raise PatchConflictError(
            "quantize_: the model is patched; call effinfer.unpatch(model) first, quantize, then "
            "patch, or use effinfer.patch(model, quantize=...)"
        )
    if model.training:
        raise UnsupportedModelError(
            "quantize_: the model is in training mode and low-bit layers are for inference: call "
            "model.eval()"
        )
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta:
        raise UnsupportedModelError(
            f"quantize_: {len(on_meta)} parameters are on the meta device ({on_meta[0]}, ...): "
            "load the weights first"
        )


def find_layers(model: nn.Module, config: QuantConfig) -> tuple[list[Layer], list[SkippedLayer]]:
    """The layers ``config`` quantizes, in the model's order, and the linear ones it leaves.

    Raises:
        ValueError: the plan names a layer that the model does not have.
    """
    owners = _weight_owners(model)
    head = _output_head(model)
    layers, skipped = [], []
    places = _linear_places(model)
    for module, names in places.items():
        reason = _obstacle(module, names, owners)
        format = config.format_for(names[0])
        if any(config.excludes(name) for name in names):
            reason = "in exclude"
        elif format is None:
            reason = "the plan leaves it in float"
        elif module is head and not config.quantize_head and not set(names) & set(config.plan):
            reason = reason or "the output head; quantize_head=True takes it too"
        if reason is None:
            assert format is not None
            layers.append(Layer(tuple(names), module, format))
        else:
            skipped.append(SkippedLayer(names[0], type(module).__name__, reason))
    known = {name for names in places.values() for name in names}
    if unknown := sorted(set(config.plan) - known):
        raise ValueError(
            f"quantize_: the plan names layers that are no linear layers of the model: "
            f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        )
    return layers, skipped


def _linear_places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear layer with all the names it has in the model."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            places.setdefault(module, []).append(name)
    return places


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that have a parameter, by its identity."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _obstacle(
    module: nn.Module, names: list[str], owners: dict[int, list[tuple[str, nn.Module]]]
) -> str | None:
    """Why this layer, as it stands, cannot be quantized."""
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "a subclass of nn.Linear, whose forward may be another"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    weight: Any = module.weight
    for name, other in owners.get(id(weight), ()):
        if not isinstance(other, nn.Linear) and not is_conv1d(other):
            return f"its weight is tied to {name}, which stays in float"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; low-bit layers compute in float32"
    return None


def parents(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold a layer, and what they call it.

    Raises:
        ValueError: the layer is the model itself.
    """
    for name in names:
        if not name:
            raise ValueError(
                "quantize_: the model itself is a linear layer, which cannot be replaced in place; "
                "use effinfer.quant.quantize_linear"
            )
        parent, _, last = name.rpartition(".")
        yield model.get_submodule(parent), last
