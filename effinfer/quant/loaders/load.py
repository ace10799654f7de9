"""One call for every kind of quantized model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.config import QuantConfig
from effinfer.quant.loaders.checkpoint import empty_checkpoint, load_checkpoint, quantization_of
from effinfer.quant.loaders.gguf_model import empty_gguf, load_gguf


def load_quantized(path: str | Path, *, activations: str | None = None) -> Any:
    """A causal language model from a quantized checkpoint, in eval mode, its linears ``LowBitLinear``.

    Neither the tool that made the checkpoint nor accelerate, optimum or a GPU is needed; memory is
    the packed weights plus one layer's codes. What is not quantized becomes float32. Nothing is
    unpickled and no code from the folder is run. ``save_pretrained`` writes effinfer's own format,
    which ``AutoModelForCausalLM.from_pretrained`` loads, bit for bit the same.

    Args:
        path: a Hugging Face folder whose ``quantization_config`` has ``quant_method`` gptq, awq
            (version gemm), hqq or bitnet, with safetensors; or a ``.gguf`` file of an architecture
            that transformers loads, which takes the ``gguf`` package.
        activations: "f32" or "int8" for the layers' inputs; None for what the checkpoint's own tool
            does: int8 for BitNet, float for the others.

    Raises:
        ValueError: a damaged, lying or unsupported checkpoint; the message names file and tensor.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    read = load_gguf if path.suffix == ".gguf" else load_checkpoint
    model = read(path, activations)
    if any(isinstance(module, LowBitLinear) for module in model.modules()):
        from effinfer.quant.hf import describe_layers, mark_quantized  # imports transformers

        mark_quantized(model, QuantConfig(layers=describe_layers(model)))
    return model


def is_quantized(path: Path) -> bool:
    """Whether ``load_quantized`` is the way to load this folder or file."""
    return path.suffix == ".gguf" or quantization_of(path) is not None


def empty_quantized(path: Path) -> Any:
    """The model ``load_quantized`` makes, on the meta device: its layers without their weights."""
    return empty_gguf(path) if path.suffix == ".gguf" else empty_checkpoint(path)
