"""effinfer as one of transformers' quantizers: ``from_pretrained(quantization_config=)``, saving and
loading again.

Importing this module imports transformers; nothing is registered there before ``register`` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from effinfer.errors import UnsupportedModelError
from effinfer.nn.lowbit import LowBitLinear, NormedLowBitLinear
from effinfer.quant.config import QUANT_METHOD, QuantConfig
from effinfer.quant.layers import parents


class RegisteredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers makes of the ``quantization_config`` in a folder: a ``QuantConfig``."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **_: Any) -> QuantConfig:
        """See ``QuantConfig.from_dict``."""
        return QuantConfig.from_dict(config_dict)


class EffinferQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads saved low-bit layers, or quantizes to the nearest once the float weights are loaded."""

    quantization_config: QuantConfig

    @property
    def is_trainable(self) -> bool:
        """Low-bit layers are for inference."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The op is registered with torch."""
        return True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed weights are ordinary tensors."""
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse early what could only fail after all weights are loaded."""
        config = self.quantization_config
        if self.pre_quantized and config.layers is None:
            raise ValueError(
                "effinfer: quantization_config in config.json has no layers, so it does not say "
                "what the folder holds"
            )
        if not self.pre_quantized and config.needs_calibration:
            raise ValueError(
                f"effinfer: method {config.method!r} needs calibration data, which from_pretrained "
                "does not take: load the float model, then effinfer.quantize_(model, config, "
                "calibration=...)"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if self.pre_quantized:
            place_empty_layers(model, self.quantization_config.layers or {})

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.pre_quantized:
            check_loaded(model)
        else:
            from effinfer.quant.quantize import quantize_

            quantize_(model.eval(), self.quantization_config)
        return model


def register() -> None:
    """Add effinfer to transformers' registry of quantizers, once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(RegisteredConfig)
        register_quantizer(QUANT_METHOD)(EffinferQuantizer)


def mark_quantized(model: nn.Module, config: QuantConfig) -> None:
    """Tell transformers that ``model`` is quantized, so that it saves what loads again."""
    if not isinstance(model, PreTrainedModel):
        return
    register()
    model.config.quantization_config = config
    model.hf_quantizer = EffinferQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every low-bit layer by its name, as ``place_empty_layers`` takes them; a ``NormedLowBitLinear``
    is one layer, with its norm's ``rms_norm_eps``."""
    layers: dict[str, dict[str, Any]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # parents first
        if isinstance(module, NormedLowBitLinear):
            layers[name] = {**module.linear.describe(), "rms_norm_eps": module.norm.eps}
            inside.add(module.linear)
        elif isinstance(module, LowBitLinear) and module not in inside:
            layers[name] = module.describe()
    return layers


def place_empty_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a low-bit layer without values wherever ``layers`` describes one.

    Raises:
        ValueError: a description that fits no layer of the model.
    """
    made: dict[nn.Module, LowBitLinear | NormedLowBitLinear] = {}
    places = []
    for name, description in layers.items():
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"effinfer: {name} is quantized but not in the model") from None
        if module not in made:  # a layer with two parents stays one layer
            try:
                layer = _empty_layer(dict(description))
            except (TypeError, ValueError) as error:
                raise ValueError(f"effinfer: quantized layer {name}: {error}") from error
            weight = getattr(module, "weight", None)
            shape = (layer.out_features, layer.in_features)
            if weight is None or tuple(weight.shape) not in (shape, shape[::-1]):
                raise ValueError(
                    f"effinfer: quantized layer {name} is {shape}, the model's is "
                    f"{None if weight is None else tuple(weight.shape)}"
                )
            made[module] = layer.to(weight.dtype)
        places.append((name, made[module]))
    for name, layer in places:
        for parent, attribute in parents(model, (name,)):
            setattr(parent, attribute, layer)


def _empty_layer(description: dict[str, Any]) -> LowBitLinear | NormedLowBitLinear:
    eps = description.pop("rms_norm_eps", None)
    if eps is not None and not (isinstance(eps, float) and 0 <= eps < 1):
        raise ValueError(f"rms_norm_eps must be a number from 0 to 1, got {eps!r}")
    with torch.device("meta"):
        layer = LowBitLinear.from_description(description).eval()
        return layer if eps is None else NormedLowBitLinear(layer, eps).eval()


def check_loaded(model: nn.Module) -> None:
    """See that every low-bit layer, and every norm inside one, got all its tensors, and its own.

    Raises:
        UnsupportedModelError: one did not.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, NormedLowBitLinear):
            shapes = {"weight": torch.Size([layer.in_features])}
            _check_tensors(f"{name}.norm", dict(layer.norm.named_parameters()), shapes)
        if not isinstance(layer, LowBitLinear):
            continue
        with torch.device("meta"):
            empty = LowBitLinear.from_description(layer.describe())
        shapes = {part: value.shape for part, value in empty.named_buffers()}
        _check_tensors(name, dict(layer.named_buffers()), shapes)
        if problem := layer.mismatch(layer.description):
            raise UnsupportedModelError(f"effinfer: layer {name}: {problem}")


def _check_tensors(
    name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    # transformers marks what it loaded, and fills what it did not find with whatever is there;
    # some of its versions do not look at the shapes of what a quantizer loads.
    missing = [
        part
        for part, value in tensors.items()
        if not hasattr(value, "_is_hf_initialized") or value.shape != shapes[part]
    ]
    if missing:
        raise UnsupportedModelError(
            f"effinfer: the folder lacks {', '.join(missing)} of layer {name}, or has them in "
            "another shape"
        )
