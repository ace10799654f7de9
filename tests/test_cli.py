"""The command line: each command works, and bad input ends in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from effinfer.cli import app
from effinfer.models import demo_path

runner = CliRunner()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the carried model that a test may damage."""
    return Path(shutil.copytree(demo_path(), tmp_path / "model"))


def failure(*arguments: object) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_info_lists_the_ops():
    output = runner.invoke(app, ["info"]).output
    assert "selective_scan" in output
    assert "torch" in output


def test_inspect_reads_no_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    result = runner.invoke(app, ["inspect", str(model_dir)])
    assert result.exit_code == 0, result.output
    assert "MambaMixer" in result.output


def test_generate_streams_a_continuation(model_dir):
    arguments = ["generate", str(model_dir), "--prompt", "The json module", "--tokens", "8"]
    patched = runner.invoke(app, arguments)
    assert patched.exit_code == 0, patched.output
    assert patched.stdout.startswith("The json module")
    assert patched.stdout == runner.invoke(app, [*arguments, "--stock"]).stdout


def test_demo_prints_the_table(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The :mod:`os` module")
    result = runner.invoke(app, ["demo", "--file", str(prompt), "--tokens", "6"])
    assert result.exit_code == 0, result.output
    for text in ("prefill", "decode", "peak memory", "tokens identical"):
        assert text in result.output


def test_prompt_errors(tmp_path, model_dir):
    assert "not both" in failure("generate", model_dir, "--prompt", "x", "--file", "y")
    assert "empty" in failure("generate", model_dir, "--prompt", "")
    assert "missing.txt" in failure("generate", model_dir, "--file", tmp_path / "missing.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "binary" in failure("generate", model_dir, "--file", binary)


def test_not_a_model_folder(tmp_path):
    assert "config.json" in failure("generate", tmp_path, "--prompt", "x")
    assert "config.json" in failure("inspect", tmp_path)


def test_unknown_model_type(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "model_type": "mamba99"}))
    assert "mamba99" in failure("inspect", model_dir)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "lying header", "empty", "missing"])
def test_damaged_weights(model_dir, damage):
    weights = model_dir / "model.safetensors"
    data = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(
            {
                "truncated": data[: len(data) // 2],
                "garbage": bytes(range(256)) * 64,
                "lying header": (2**40).to_bytes(8, "little") + data[8:],
                "empty": b"",
            }[damage]
        )
    assert "cannot load" in failure("generate", model_dir, "--prompt", "x", "--tokens", "1")


def test_damaged_config(model_dir):
    (model_dir / "config.json").write_text("{not json")
    assert "cannot read" in failure("inspect", model_dir)
