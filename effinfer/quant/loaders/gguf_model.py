"""A transformers model from a GGUF file, its matrices in low-bit layers as the file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.loaders.assemble import (
    check_layers,
    meta_model,
    put_empty,
    put_floats,
    put_lowbit,
    transformers_reads,
)
from effinfer.quant.loaders.ggml import GGML_TYPES
from effinfer.quant.loaders.gguf_file import FLOAT_TYPES, GgufFile


def load_gguf(path: Path, activations: str | None = None) -> Any:
    """The model of a GGUF file: see ``load_quantized``.

    transformers says what the model is and which tensor goes where, and needs the ``gguf`` package
    for it; the weights are read here, after the header was found consistent.
    """
    file, model, processor, names = _open(path)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    floats: dict[str, str] = {}
    for name, info in file.tensors.items():
        target = names.get(name)
        if target is None:
            if info.type not in FLOAT_TYPES:
                raise ValueError(f"{path}: tensor {name!r} fits no parameter of the model")
            continue  # tables that transformers computes from the configuration
        layer = target.removesuffix(".weight")
        if info.type in GGML_TYPES and layer in linears and len(info.shape) == 2:
            weight = _with_rows(file.weight(name), _row_order(processor, name, info.shape))
            bias = _bias(file, processor, name, linears[layer])
            put_lowbit(model, layer, weight, bias, activations or "f32")
        else:
            floats[target] = name
    put_floats(model, path, floats, lambda target: _float(file, processor, floats[target]))
    return model


def empty_gguf(path: Path) -> Any:
    """The same on the meta device: layers and shapes, of the weights only their names."""
    file, model, _, names = _open(path)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, info in file.tensors.items():
        layer = names.get(name, "").removesuffix(".weight")
        if info.type in GGML_TYPES and layer in linears:
            put_empty(
                model, layer, GGML_TYPES[info.type].format, GGML_TYPES[info.type].group, "f32"
            )
    return model


def _open(path: Path) -> tuple[GgufFile, Any, Any, Mapping[str, str]]:
    """A file, the empty model of it, what undoes llama.cpp's changes, and tensors' parameters."""
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    check_layers(path, file.metadata.get(f"{architecture}.block_count", 0), len(file.tensors))
    model = meta_model(path, _config(path))
    processor, names = _transformers_map(file, model)
    return file, model, processor, names


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    with transformers_reads(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def _transformers_map(file: GgufFile, model: Any) -> tuple[Any, Mapping[str, str]]:
    """What undoes llama.cpp's changes to a tensor, and the parameter each tensor is."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = file.metadata.get("general.architecture")
    with transformers_reads(file.path):
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(model.config.to_dict())
        return processor, get_gguf_hf_weights_map(model, processor)


def _row_order(processor: Any, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """The order transformers puts a matrix's rows in (rotary halves, for one), found by letting it
    move row numbers; None where it leaves them."""
    numbers = np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape)
    moved = processor.process(weights=numbers, name=name).weights
    if moved is numbers:
        return None
    rows = torch.from_numpy(np.ascontiguousarray(moved[:, 0])).long()
    if moved.shape != shape or not (moved == moved[:, :1]).all():
        raise ValueError(f"{name}: transformers changes more than its order of rows")
    return rows


def _with_rows(weight: LowBitWeight, rows: Tensor | None) -> LowBitWeight:
    if rows is None:
        return weight
    return replace(
        weight,
        codes=weight.codes[rows],
        scale=weight.scale[rows],
        zero=None if weight.zero is None else weight.zero[rows],
        offset=None if weight.offset is None else weight.offset[rows],
    )


def _bias(file: GgufFile, processor: Any, weight_name: str, layer: nn.Linear) -> Tensor | None:
    name = weight_name.removesuffix(".weight") + ".bias"
    if layer.bias is None:
        return None
    if name not in file.tensors:
        raise ValueError(f"{file.path}: tensor {name!r} is missing")
    return _float(file, processor, name)


def _float(file: GgufFile, processor: Any, name: str) -> Tensor:
    values = file.tensor(name).float().numpy()
    return torch.from_numpy(
        np.ascontiguousarray(processor.process(weights=values, name=name).weights)
    )
