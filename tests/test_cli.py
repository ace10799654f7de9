"""The command line: each command works, and bad input ends in one clear line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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


@pytest.fixture
def one_thread() -> Iterator[list[str]]:
    """An option for it, which is good for small models; later tests have all threads again."""
    before = torch.get_num_threads()
    yield ["--threads", "1"]
    torch.set_num_threads(before)


@pytest.mark.parametrize("loops", [2, 4])
def test_recursive_demo_shows_three_ways(tmp_path, loops, one_thread):
    png = tmp_path / "depths.png"
    arguments = ["demo", "--recursive", "--loops", loops, "--tokens", 4, "--slots", 3]
    arguments += ["--picture", png, *one_thread]
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80 + len(str(png))  # a path is not broken
    every_loop = "".join(str(loop + 1) for loop in range(loops))
    assert sum(line.startswith("slot ") for line in lines) == 3 * 3
    assert every_loop in next(line for line in lines if line.startswith("slot 1"))
    (depths,) = (line for line in lines if "mean depth" in line)
    assert f"{loops}.00 of {loops}" in depths
    for text in ("launches per token", "tokens/s", "12 of 12", "every token is full depth's"):
        assert text in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_recursive_demo_fails_where_tokens_differ(monkeypatch):
    monkeypatch.setattr("effinfer.demo_recursive.run_recursive_demo", lambda *_: False)
    assert runner.invoke(app, ["demo", "--recursive"]).exit_code == 1
    monkeypatch.setattr("effinfer.demo_recursive.run_recursive_demo", lambda *_: True)
    assert runner.invoke(app, ["demo", "--recursive"]).exit_code == 0


def test_recursive_demo_errors(tmp_path, monkeypatch, one_thread):
    assert "need --recursive" in failure("demo", "--loops", 2)
    assert "need --recursive" in failure("demo", "--slots", 2)
    assert "need --recursive" in failure("demo", "--picture", tmp_path / "x.png")
    assert "no --bits" in failure("demo", "--recursive", "--bits", 4)
    assert "2 or 4, got 3" in failure("demo", "--recursive", "--loops", 3)
    assert "512" in failure("demo", "--recursive", "--tokens", 1000)
    nowhere = tmp_path / "no" / "folder.png"
    arguments = ["demo", "--recursive", "--tokens", 1, "--picture", nowhere, *one_thread]
    assert str(nowhere) in failure(*arguments)
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed
    assert "effinfer[demo]" in failure("demo", "--recursive", "--picture", tmp_path / "x.png")


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


def test_quantize_makes_a_folder_that_loads(model_dir, tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("The :mod:`json` module reads and writes objects as text. " * 4)
    out = tmp_path / "low" / "model"
    options = ["--bits", "3", "--group-size", "32", "--method", "gptq", "--calibration", str(text)]
    result = runner.invoke(app, ["quantize", str(model_dir), str(out), *options])
    assert result.exit_code == 0, result.output
    assert "output error" in result.output
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    quantized = out / "model.safetensors"
    assert quantized.stat().st_size < (model_dir / "model.safetensors").stat().st_size
    arguments = ["generate", str(out), "--prompt", "The json module", "--tokens", "4"]
    loaded = runner.invoke(app, arguments)
    assert loaded.exit_code == 0, loaded.output
    assert loaded.stdout.startswith("The json module")


def test_quantize_errors(model_dir, tmp_path):
    out = tmp_path / "out"
    assert "exists already" in failure("quantize", model_dir, tmp_path)
    assert "bits must be one of" in failure("quantize", model_dir, out, "--bits", "5")
    assert "bits must be one of" in failure("quantize", model_dir, out, "--bits", "nan")
    assert "method must be one of" in failure("quantize", model_dir, out, "--method", "awq")
    assert "needs --calibration" in failure("quantize", model_dir, out, "--method", "gptq")
    assert "got 17" in failure("quantize", model_dir, out, "--group-size", "17")
    assert "config.json" in failure("quantize", tmp_path / "nowhere", out)
    assert not out.exists()


def test_demo_of_few_bits_says_how_far_tokens_agree(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The :mod:`os` module")
    result = runner.invoke(app, ["demo", "--file", str(prompt), "--tokens", "6", "--bits", "2"])
    assert result.exit_code == 0, result.output
    for text in ("prefill", "perplexity of the prompt", "of 6 tokens are the float", "weights"):
        assert text in " ".join(result.output.split())
    assert "identical" not in result.output
    assert "bits must be one of" in failure("demo", "--bits", "7")
