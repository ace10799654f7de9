"""Loads model folders the careful way: local files, safetensors, no code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_model(model_dir: Path) -> tuple[Any, Any]:
    """Model (in eval mode, float32) and tokenizer of a local Hugging Face folder.

    Raises whatever transformers and safetensors raise for a folder they cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(model_dir, **options)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, use_safetensors=True, dtype=torch.float32, **options
    )
    return model.eval(), tokenizer


def empty_model(model_dir: Path) -> Any:
    """The model a folder's ``config.json`` describes, on the meta device: shapes without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir} has no config.json")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
