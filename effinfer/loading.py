"""Loads model folders the careful way: local files, safetensors, no code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from effinfer import quant, recursive


def register_with_transformers() -> None:
    """Let transformers' ``from_pretrained`` load what effinfer saves; imports transformers.

    That is quantized models (effinfer joins the registry of quantizers) and recursive ones (the
    Auto classes learn their type). Importing effinfer alone changes nothing in transformers.
    """
    quant.register_with_transformers()
    recursive.register_with_transformers()


def load_model(model_dir: str | Path) -> tuple[Any, Any]:
    """Model (in eval mode, float32 or low-bit) and tokenizer of a local Hugging Face folder, or of a
    GGUF file.

    Raises whatever transformers, safetensors and the loaders raise for what they cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from effinfer.quant.loaders.load import is_quantized, load_quantized

    model_dir = Path(model_dir)
    register_with_transformers()  # for folders that effinfer saved
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if model_dir.suffix == ".gguf":
        model = load_quantized(model_dir)  # first, since it checks the file
        return model, AutoTokenizer.from_pretrained(
            model_dir.parent, gguf_file=model_dir.name, **options
        )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, **options)
    if is_quantized(model_dir):
        return load_quantized(model_dir), tokenizer
    model, found = AutoModelForCausalLM.from_pretrained(
        model_dir, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    if found["missing_keys"]:  # transformers would go on with random numbers
        names = sorted(found["missing_keys"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"load_model: {model_dir} lacks weights: {', '.join(names[:3])}{more}")
    return model.eval(), tokenizer


def empty_model(model_dir: Path) -> Any:
    """The model a folder or GGUF file describes, on the meta device: shapes without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from effinfer.quant.loaders.load import empty_quantized, is_quantized

    register_with_transformers()
    if not is_model(model_dir):
        raise FileNotFoundError(f"{model_dir} has no config.json and is no .gguf file")
    if is_quantized(model_dir):
        return empty_quantized(model_dir)
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def is_model(path: Path) -> bool:
    """Whether there is something to load: a folder with ``config.json``, or a GGUF file."""
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())
