"""Through transformers: quantized while loading, saved, loaded again, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import effinfer
from effinfer import QuantConfig, quantize_
from effinfer.errors import UnsupportedModelError
from effinfer.nn import LowBitLinear

from .models import tiny_lm, tokens


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def low_bit(model: Any) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, LowBitLinear)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A llama quantized by ``quantize_`` and saved."""
    model = tiny_lm("llama")
    quantize_(model, QuantConfig(bits=3, group_size=32, plan={"model.layers.0.mlp.up_proj": 8}))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("family", ["llama", "mamba", "gpt2"])
def test_from_pretrained_save_and_reload(family: str, tmp_path: Path) -> None:
    config = QuantConfig(bits=4, group_size=32)
    stock = tiny_lm(family)
    stock.save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=config)
    quantize_(stock, config)
    assert low_bit(model) == low_bit(stock) != []
    assert "lm_head" not in low_bit(model)
    want = stock(tokens()).logits
    assert torch.equal(model(tokens()).logits, want)
    model.save_pretrained(tmp_path / "low")
    assert [f.name for f in (tmp_path / "low").glob("*.safetensors")] == ["model.safetensors"]
    assert not list((tmp_path / "low").glob("*.bin"))
    entry = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "effinfer"
    assert sorted(entry["layers"]) == sorted(low_bit(model))
    again = load(tmp_path / "low")
    assert low_bit(again) == low_bit(model)
    assert torch.equal(again(tokens()).logits, want)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(load(tmp_path / "twice")(tokens()).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_bits_reload_in_either_dtype(saved: Path, dtype: torch.dtype) -> None:
    model = load(saved, dtype=dtype)
    layer = model.model.layers[0].mlp
    assert (layer.up_proj.format, layer.down_proj.format) == ("int8", "int3")
    stored = load_file(saved / "model.safetensors")
    for part in ("packed", "scale", "zero"):
        value = stored[f"model.layers.0.mlp.down_proj.{part}"]
        assert torch.equal(getattr(layer.down_proj, part), value)
        assert getattr(layer.down_proj, part).dtype == value.dtype
    assert model(tokens()).logits.dtype == dtype


def test_a_folder_needs_nothing_but_the_registration(saved: Path) -> None:
    code = f"""
import sys
import effinfer
assert "transformers" not in sys.modules
effinfer.register_with_transformers()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, local_files_only=True)
assert type(model.model.layers[0].mlp.up_proj) is effinfer.nn.LowBitLinear
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generates(saved: Path) -> None:
    model = load(saved)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert model.generate(tokens(), **options).shape[1] > 12


def test_methods_that_need_calibration_say_so(tmp_path: Path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs calibration data, which from_pretrained"):
        load(tmp_path, quantization_config=QuantConfig(method="gptq"))


def test_a_loaded_model_is_not_quantized_twice(saved: Path) -> None:
    with pytest.raises(effinfer.PatchConflictError, match="low-bit layers already"):
        quantize_(load(saved), QuantConfig())


def edit(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def drop_layers(config: Any) -> None:
    del config["layers"]


def unknown_layer(config: Any) -> None:
    config["layers"]["model.nowhere"] = config["layers"]["model.layers.0.mlp.up_proj"]


def other_shape(config: Any) -> None:
    config["layers"]["model.layers.0.mlp.up_proj"]["in_features"] = 32


def bad_format(config: Any) -> None:
    config["layers"]["model.layers.0.mlp.up_proj"]["format"] = "int7"


def unknown_option(config: Any) -> None:
    config["layers"]["model.layers.0.mlp.up_proj"]["colour"] = 1


def not_a_size(config: Any) -> None:
    config["layers"]["model.layers.0.mlp.up_proj"]["out_features"] = "many"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_layers, "has no layers"),
        (unknown_layer, "model.nowhere is quantized but not in the model"),
        (other_shape, r"up_proj is \(96, 32\), the model's is \(96, 64\)"),
        (bad_format, "format must be one of"),
        (unknown_option, "colour"),
        (not_a_size, "out_features must be a size"),
    ],
)
def test_a_lying_config_is_refused(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved)


def other_format(config: Any) -> None:
    config["layers"]["model.layers.0.mlp.down_proj"].update(format="int4", zero=True)


def test_a_config_of_other_tensors_is_refused(saved: Path) -> None:
    edit(saved, other_format)
    with pytest.raises((RuntimeError, UnsupportedModelError), match=r"down_proj|mismatch"):
        load(saved)


@pytest.mark.parametrize("part", ["packed", "scale", "zero", "description"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_tensors_are_refused(saved: Path, part: str, damage: str) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    key = f"model.layers.1.mlp.down_proj.{part}"
    value = tensors.pop(key)
    if damage == "cut":
        tensors[key] = value[: value.shape[0] // 2].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((RuntimeError, UnsupportedModelError), match=rf"{part}|mismatch"):
        load(saved)
