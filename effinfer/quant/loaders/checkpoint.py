"""Model folders that GPTQ, AWQ, HQQ or BitNet tools wrote, without those tools."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.loaders.assemble import (
    check_float,
    check_layers,
    meta_model,
    put_empty,
    put_floats,
    put_lowbit,
    put_tensor,
    transformers_reads,
)
from effinfer.quant.loaders.awq import awq_weight
from effinfer.quant.loaders.bitnet import (
    bitnet_online_weight,
    bitnet_weight,
    ternary_float_weight,
)
from effinfer.quant.loaders.common import FLOATS, check_matrix, integer_format
from effinfer.quant.loaders.gptq import gptq_weight
from effinfer.quant.loaders.hqq import hqq_dense, hqq_meta, hqq_weight
from effinfer.quant.loaders.safetensors_folder import SafetensorsFolder, read_json

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# tensors that old checkpoints hold and models compute
DERIVED = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")
HQQ_TENSORS = ("W_q", "scale", "zero", "nbits", "group_size", "axis", "shape")


@dataclass(frozen=True)
class Method:
    """How one tool's folders are read.

    Attributes:
        key: the tensor of a layer that tells it is quantized.
        activations: what the layers do with their input in the tool itself.
        read: a layer's weight from the files, its name, the linear it replaces and the
            ``quantization_config``; a plain tensor where no low-bit format holds it.
    """

    key: str
    activations: str
    read: Callable[[SafetensorsFolder, str, nn.Linear, Mapping[str, Any]], LowBitWeight | Tensor]


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """A folder's ``quantization_config`` where its method is one of ``METHODS``, else None.

    Raises:
        ValueError: ``config.json`` is not a JSON object.
    """
    path = folder / "config.json"
    found = read_json(path).get("quantization_config") if path.is_file() else None
    method = found.get("quant_method") if isinstance(found, dict) else None
    return found if isinstance(method, str) and method in METHODS else None


def load_checkpoint(folder: Path, activations: str | None = None) -> Any:
    """The model of a quantized folder: see ``load_quantized``."""
    quantization, files, model, layers = _open(folder)
    method = METHODS[quantization["quant_method"]]
    for name, layer in layers.items():
        try:
            weight = method.read(files, name, layer, quantization)
            if isinstance(weight, Tensor):
                check_float(f"{name}.weight", weight, (layer.out_features, layer.in_features))
                put_tensor(model, f"{name}.weight", weight)
                continue
            bias = _bias(files, name, layer)
            norm = _inner_norm(files, name, quantization)
            put_lowbit(model, name, weight, bias, activations or method.activations, norm)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder}: {error}") from error
    put_floats(model, folder, files, files.__getitem__)
    _read_generation_config(model, folder)
    return model


def empty_checkpoint(folder: Path) -> Any:
    """The same on the meta device: layers and shapes, of the weights only their names."""
    quantization, _, model, layers = _open(folder)
    method = METHODS[quantization["quant_method"]]
    settings = {**quantization, **_hqq_settings(quantization)}
    bits = math.ceil(settings.get("nbits") or settings.get("bits") or 4)
    group_size = settings.get("group_size")
    for name, layer in layers.items():
        k = layer.in_features
        if quantization["quant_method"] == "bitnet":
            put_empty(model, name, "ternary", k, method.activations)
        else:
            group = group_size if isinstance(group_size, int) and group_size > 0 else k
            put_empty(model, name, integer_format(bits, group, k), group, method.activations)
    return model


def _open(folder: Path) -> tuple[dict[str, Any], SafetensorsFolder, Any, dict[str, nn.Linear]]:
    """A folder's quantization, its tensors, the empty model, and the linears to be replaced."""
    quantization = quantization_of(folder)
    if quantization is None:
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config.quant_method must be one of "
            f"{', '.join(METHODS)}"
        )
    files = SafetensorsFolder(folder)
    model = meta_model(folder, _config(folder, len(files.files)))
    layers = quantized_layers(model, files, quantization)
    _check_all_used(files, model, layers)
    return quantization, files, model, layers


def _config(folder: Path, tensors: int) -> Any:
    """The model's configuration, as of an unquantized folder."""
    from transformers import AutoConfig

    path = folder / "config.json"
    written = read_json(path)
    for part in (written, written.get("text_config")):
        for key in LAYER_COUNTS:
            if isinstance(part, dict) and key in part:
                check_layers(path, part[key], tensors)
    with transformers_reads(path):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config  # of the files; the model holds low-bit layers of ours
    return config


def quantized_layers(
    model: nn.Module, files: SafetensorsFolder, quantization: Mapping[str, Any]
) -> dict[str, nn.Linear]:
    """The linears of a model that the folder has quantized, by name."""
    key = METHODS[quantization["quant_method"]].key
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if (
        quantization["quant_method"] == "bitnet"
        and quantization.get("quantization_mode") == "online"
    ):
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = quantization.get("modules_to_not_convert") or ["lm_head"]
        return {n: m for n, m in linears.items() if should_convert_module(n, kept)}
    return {n: m for n, m in linears.items() if f"{n}.{key}" in files}


def _check_all_used(files: SafetensorsFolder, model: Any, layers: Collection[str]) -> None:
    """A tensor that nothing takes would be weights, or AWQ's activation scales, silently left out."""
    known = set(model.state_dict())
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *DERIVED]
    for name, path in files.files.items():
        owner = name.rpartition(".")[0].removesuffix(".rms_norm")
        if name in known or owner in layers or any(re.search(p, name) for p in ignored):
            continue
        raise ValueError(f"{path}: tensor {name!r} fits nothing in the model")


def _read_gptq(
    files: SafetensorsFolder, name: str, layer: nn.Linear, quantization: Mapping[str, Any]
) -> LowBitWeight:
    qweight, scales = files[f"{name}.qweight"], files[f"{name}.scales"]
    bits, group_size = quantization.get("bits"), quantization.get("group_size", -1)
    if quantization.get("dynamic"):  # settings that differ by layer: read off the shapes
        check_matrix(f"{name}.qweight", qweight, (torch.int32,))
        check_matrix(f"{name}.scales", scales, FLOATS)
        bits = qweight.shape[0] * 32 // layer.in_features
        group_size = -(-layer.in_features // scales.shape[0])
    return gptq_weight(
        qweight,
        files[f"{name}.qzeros"],
        scales,
        files.get(f"{name}.g_idx"),
        bits=_integer("bits", bits),
        group_size=_integer("group_size", group_size),
        checkpoint_format=quantization.get("checkpoint_format") or "gptq",
        sym=quantization.get("sym") is True,
        name=name,
    )


def _read_awq(
    files: SafetensorsFolder, name: str, layer: nn.Linear, quantization: Mapping[str, Any]
) -> LowBitWeight:
    version = str(quantization.get("version", "gemm")).lower()
    if version != "gemm" or quantization.get("bits", 4) != 4:
        raise ValueError(
            "an AWQ quantization_config must have version 'gemm' and 4 bits, "
            f"got {version!r} and {quantization.get('bits')!r}"
        )
    return awq_weight(
        files[f"{name}.qweight"],
        files[f"{name}.qzeros"],
        files[f"{name}.scales"],
        group_size=_integer("group_size", quantization.get("group_size", 128)),
        name=name,
    )


def _read_hqq(
    files: SafetensorsFolder, name: str, layer: nn.Linear, quantization: Mapping[str, Any]
) -> LowBitWeight | Tensor:
    tensors = {key: files[f"{name}.{key}"] for key in HQQ_TENSORS if f"{name}.{key}" in files}
    settings = {**_hqq_settings(quantization), **hqq_meta(tensors, name)}
    shape = settings.get("shape", (layer.out_features, layer.in_features))
    group_size = settings.get("group_size")
    arguments: dict[str, Any] = {
        "nbits": settings.get("nbits"),
        "shape": shape,
        "group_size": None if group_size is None else _integer("group_size", group_size),
        "name": name,
    }
    read = hqq_weight if settings.get("axis", 1) == 1 else hqq_dense
    return read(files[f"{name}.W_q"], files[f"{name}.scale"], files[f"{name}.zero"], **arguments)


def _hqq_settings(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What all layers have in common, unless their own tensors say otherwise."""
    shared = quantization.get("quant_config")
    if isinstance(shared, dict):
        shared = shared.get("weight_quant_params", shared)
    return shared if isinstance(shared, dict) else {}


def _read_bitnet(
    files: SafetensorsFolder, name: str, layer: nn.Linear, quantization: Mapping[str, Any]
) -> LowBitWeight:
    weight = files[f"{name}.weight"]
    if quantization.get("quantization_mode") == "online":
        return bitnet_online_weight(weight, name)
    scale = files[f"{name}.weight_scale"]
    linear_class = quantization.get("linear_class", "bitlinear")
    if linear_class == "autobitlinear" and weight.is_floating_point():
        return ternary_float_weight(weight, scale, name)
    return bitnet_weight(
        weight, scale, out_features=layer.out_features, linear_class=linear_class, name=name
    )


def _bias(files: SafetensorsFolder, name: str, layer: nn.Linear) -> Tensor | None:
    """A layer's bias; files of AutoGPTQ have one, of zeros, for layers without."""
    bias = files[f"{name}.bias"] if layer.bias is not None else files.get(f"{name}.bias")
    return None if layer.bias is None and bias is not None and not bias.any() else bias


def _inner_norm(
    files: SafetensorsFolder, name: str, quantization: Mapping[str, Any]
) -> tuple[float, Tensor] | None:
    """Epsilon and weight of BitNet's RMSNorm inside a linear, where the folder says there is one."""
    if quantization["quant_method"] != "bitnet" or not quantization.get("use_rms_norm"):
        return None
    return float(quantization.get("rms_norm_eps", 1e-6)), files[f"{name}.rms_norm.weight"]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"quantization_config: {name} must be an integer, got {value!r}")
    return int(value)


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    with transformers_reads(path):
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


METHODS = {
    "gptq": Method("qweight", "f32", _read_gptq),
    "awq": Method("qweight", "f32", _read_awq),
    "hqq": Method("W_q", "f32", _read_hqq),
    "bitnet": Method("weight_scale", "int8", _read_bitnet),
}
