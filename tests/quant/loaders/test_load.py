"""The command line on quantized folders and GGUF files; damage anywhere in their files."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from effinfer.cli import app
from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.loaders import load_quantized
from effinfer.quant.loaders.load import empty_quantized
from tests.quant.loaders.test_checkpoints import CASES, write
from tests.quant.loaders.test_gguf_model import write_llama

METHODS = ("gptq", "awq", "hqq", "bitnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for case in METHODS:
        made[case] = tmp_path_factory.mktemp(case)
        write(made[case], case, tied=True)
        vocabulary = {"<unk>": 0, "the": 1, "json": 2, "module": 3}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(made[case])
    made["gguf"] = write_llama(tmp_path_factory.mktemp("gguf") / "model.gguf")
    return made


@pytest.mark.parametrize("case", [*METHODS, "gguf"])
def test_generate(folders, case):
    arguments = ["generate", str(folders[case]), "--prompt", "the json module", "--tokens", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "the json module" in result.stdout


@pytest.mark.parametrize("case", [*METHODS, "gguf"])
def test_inspect(folders, case):
    result = CliRunner().invoke(app, ["inspect", str(folders[case])])
    assert result.exit_code == 0, result.output
    assert "LlamaRMSNorm" in result.output


@pytest.mark.parametrize("case", [*METHODS, "gguf"])
def test_the_empty_model_has_the_layers_of_the_loaded_one(folders, case):
    empty, loaded = empty_quantized(folders[case]), load_quantized(folders[case])
    for name, layer in loaded.named_modules():
        other = empty.get_submodule(name)
        assert type(other) is type(layer), name
        if isinstance(layer, LowBitLinear):
            assert (other.format, other.in_features) == (layer.format, layer.in_features), name
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("case", [*METHODS, "gguf"])
def test_saved_it_loads_as_effinfers_own(folders, tmp_path, case):
    model = load_quantized(folders[case])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_generation_config_is_read(folders, tmp_path):
    folder = shutil.copytree(folders["gptq"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    assert load_quantized(folder).generation_config.max_new_tokens == 7


@pytest.mark.parametrize("case", [*METHODS, "gguf"])
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=5),
    st.integers(0, 2**20),
)
def test_damage_is_an_error_or_a_model(folders, tmp_path, case, changes, cut):
    """Bytes changed near the start, where headers are, and files cut short."""
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    if case == "gguf":
        path = target = tmp_path / "model.gguf"
        shutil.copy(folders[case], path)
    else:
        target = shutil.copytree(folders[case], tmp_path / "model")
        path = target / "model.safetensors"
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at % min(len(data), 4096)] = value
    if cut % 2:
        data = data[: cut % len(data)]
    path.write_bytes(data)
    try:
        model = load_quantized(target)
    except (ValueError, TypeError, FileNotFoundError):
        return
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, model.config.vocab_size)


SIZES = st.sampled_from((-1, 0, 1, 3, 2**31, 2**62, 1.5, None, "x", [1], {}))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_configuration_of_anything_is_an_error_or_a_model(folders, tmp_path, data):
    """Any one value of ``config.json``, or of what it says of the quantization, replaced."""
    case = data.draw(st.sampled_from(METHODS))
    config = json.loads((folders[case] / "config.json").read_text())
    part = data.draw(st.sampled_from((config, config["quantization_config"])))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(SIZES)
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    shutil.copytree(folders[case], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    try:
        model = load_quantized(tmp_path / "model")
    except (ValueError, TypeError):
        return
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_what_is_no_model(tmp_path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "x.gguf"), "--prompt", "a"])
    assert result.exit_code == 1
    assert "no .gguf file" in result.output
    assert set(METHODS) <= {case.split("-")[0] for case in CASES}
