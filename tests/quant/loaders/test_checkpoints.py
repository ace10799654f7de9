"""Whole model folders: written as each tool writes them, loaded, and compared with the float model
that has the dequantized weights."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import pack_weights

from effinfer.errors import UnsupportedModelError
from effinfer.nn.lowbit import LowBitLinear
from effinfer.quant.loaders import load_quantized
from tests.quant.loaders import test_awq, test_gptq, test_hqq
from tests.quant.loaders.logits import check_logits

GROUP = 32


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            **options,
        )
    ).eval()


def gptq_layer(weight, act_order=False):
    n, k = weight.shape
    codes, zeros, scales = test_gptq.make(4, k=k, n=n, group_size=GROUP)
    g_idx = torch.arange(k) // GROUP
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    tensors = {
        "qweight": test_gptq.pack_down(codes, 4),
        "qzeros": test_gptq.pack_zeros(zeros, 4, True),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return tensors, test_gptq.expected(codes, zeros, scales.float(), g_idx)


def awq_layer(weight):
    n, k = weight.shape
    codes, zeros, scales = test_awq.make(k=k, n=n, group_size=GROUP)
    tensors = {"qweight": test_awq.pack(codes), "qzeros": test_awq.pack(zeros), "scales": scales}
    return tensors, test_awq.expected(codes, zeros, scales.float(), GROUP)


def hqq_layer(weight, axis=1):
    n, k = weight.shape
    codes, arguments = test_hqq.make(4, n=n, k=k, group_size=GROUP, axis=axis)
    tensors = {
        "W_q": arguments["w_q"],
        "scale": arguments["scale"].contiguous(),
        "zero": arguments["zero"].contiguous(),
        "nbits": torch.tensor(4, dtype=torch.int32),
        "group_size": torch.tensor(GROUP, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "shape": torch.tensor([n, k]),
    }
    return tensors, test_hqq.expected(codes, arguments)


def bitnet_layer(weight, multiply=False):
    values = torch.randint(-1, 2, weight.shape)
    scale = torch.tensor([0.05 if multiply else 20.0])
    tensors = {"weight": pack_weights(values.clone()), "weight_scale": scale}
    return tensors, values * scale if multiply else values / scale


CASES = {
    "gptq": (gptq_layer, {}, {"bits": 4, "group_size": GROUP, "sym": False}),
    "gptq-act-order": (gptq_layer, {"act_order": True}, {"bits": 4, "group_size": GROUP}),
    "gptq-dynamic": (gptq_layer, {}, {"bits": 8, "group_size": 128, "dynamic": {"x": {}}}),
    "awq": (awq_layer, {}, {"bits": 4, "group_size": GROUP, "version": "gemm"}),
    "hqq": (
        hqq_layer,
        {},
        {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": GROUP}}},
    ),
    "hqq-own-settings": (hqq_layer, {}, {"quant_config": {"weight_quant_params": {"nbits": 3}}}),
    "hqq-axis-0": (hqq_layer, {"axis": 0}, {"quant_config": {}}),
    "bitnet": (bitnet_layer, {}, {"linear_class": "bitlinear"}),
    "bitnet-auto": (
        bitnet_layer,
        {"multiply": True},
        {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a case, written once, and the float model with the dequantized weights."""

    @functools.cache
    def once(case, tied):
        folder = tmp_path_factory.mktemp(case)
        return folder, write(folder, case, tied)

    return once


@pytest.fixture
def write_to(written):
    """A copy of a case's folder to do damage in."""

    def copy(folder, case):
        original, model = written(case, False)
        shutil.copytree(original, folder)
        return model

    return copy


def write(folder, case, tied):
    make, arguments, quantization = CASES[case]
    model = llama(tie_word_embeddings=tied)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            tensors, weight = make(layer.weight, **arguments)
            del state[f"{name}.weight"]
            state.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
            layer.weight.data = weight.float()
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": case.split("-")[0], **quantization},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_dequantized_one(written, case, tied):
    folder, plain = written(case, tied)
    model = load_quantized(folder, activations="f32")
    lowbit = {name: m for name, m in model.named_modules() if isinstance(m, LowBitLinear)}
    assert len(lowbit) == (0 if case == "hqq-axis-0" else 7)
    for name, layer in lowbit.items():
        assert torch.equal(layer.lowbit_weight().dequantize(), plain.get_submodule(name).weight), (
            name
        )
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    check_logits(model, plain)


def test_zero_biases_of_layers_without_are_dropped(tmp_path, write_to):
    plain = write_to(tmp_path / "model", "gptq")
    name = "model.layers.0.mlp.up_proj"
    rewrite(tmp_path / "model", put(f"{name}.bias", torch.zeros(128)))
    model = load_quantized(tmp_path / "model")
    assert model.get_submodule(name).bias is None
    check_logits(model, plain)
    rewrite(tmp_path / "model", put(f"{name}.bias", torch.ones(128)))
    assert torch.equal(load_quantized(tmp_path / "model").get_submodule(name).bias, torch.ones(128))


def test_activation_scales_are_not_left_out(tmp_path, write_to):
    """Which AWQ puts in front of some activations, and no model here has."""
    write_to(tmp_path / "model", "awq")
    rewrite(tmp_path / "model", put("model.layers.0.mlp.act.scales", torch.ones(128)))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.act\.scales' fits nothing in"):
        load_quantized(tmp_path / "model")


def test_bitnets_inputs_are_int8_unless_told(tmp_path, write_to):
    write_to(tmp_path / "model", "bitnet")
    kinds = {
        m.activations
        for m in load_quantized(tmp_path / "model").modules()
        if isinstance(m, LowBitLinear)
    }
    assert kinds == {"int8"}


def test_bitnets_inner_norm(tmp_path, write_to):
    plain = write_to(tmp_path / "model", "bitnet")
    norm = torch.linspace(0.5, 2, 64)
    rewrite(
        tmp_path / "model",
        lambda state: state.update(
            {
                f"{name}.rms_norm.weight": torch.linspace(0.5, 2, layer.in_features)
                for name, layer in plain.named_modules()
                if isinstance(layer, nn.Linear) and name != "lm_head"
            }
        ),
    )
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"use_rms_norm": True, "rms_norm_eps": 1e-5}
    path.write_text(json.dumps(config))
    model = load_quantized(path.parent, activations="f32")
    x = torch.randn(3, 64)
    normed = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
    want = plain.get_submodule(Q)(normed)
    assert torch.allclose(model.get_submodule(Q)(x), want, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.get_submodule(Q)(x), model.get_submodule(Q)(x))
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    rewrite(tmp_path / "ours", lambda state: state.pop(f"{Q}.norm.weight"))
    with pytest.raises(UnsupportedModelError, match=f"lacks weight of layer {Q}.norm"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def test_sharded(tmp_path, write_to):
    plain = write_to(tmp_path / "model", "awq")
    state = load_file(tmp_path / "model" / "model.safetensors")
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n] for n in part}, tmp_path / "model" / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check_logits(load_quantized(tmp_path / "model"), plain)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../model.safetensors")}))
    with pytest.raises(ValueError, match="must list files of the folder"):
        load_quantized(tmp_path / "model")


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.update({name: tensor})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}.scales"), f"tensor '{Q}.scales' is missing"),
        (drop("model.norm.weight"), "tensor 'model.norm.weight' is missing, of shape"),
        (put("model.norm.weight", torch.ones(63)), r"model.norm.weight must have shape \(64,\)"),
        (put("model.norm.weight", torch.ones(64).int()), "model.norm.weight must be floating"),
        (put(f"{Q}.bias", torch.ones(65)), f"{Q}.bias must have shape"),
        (put(f"{Q}.scales", torch.ones(2, 64) * torch.nan), f"{Q}.scales must be finite"),
        (put(f"{Q}.g_idx", torch.full((64,), 7)), f"{Q}.g_idx must lie in 0..1"),
        (put(f"{Q}.qweight", torch.ones(16, 64).int()), f"{Q}.scales must have shape"),
        (
            put("other.qweight", torch.ones(8, 64).int()),
            "'other.qweight' fits nothing in the model",
        ),
    ],
)
def test_damaged_folders_name_file_and_tensor(tmp_path, write_to, change, message):
    write_to(tmp_path / "model", "gptq")
    rewrite(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_quantized(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "exl3"}, "quant_method must be one of gptq, awq, hqq, bitnet"),
        ({"num_hidden_layers": 10**9}, "the number of layers must be at most its 37 tensors"),
        ({"num_hidden_layers": "x"}, "the number of layers must be at most"),
        ({"bits": "4"}, "bits must be an integer, got '4'"),
        ({"bits": 3}, "must"),
        ({"group_size": 64}, "scales must have shape"),
        ({"group_size": -7}, "group_size must be -1 or at least 1"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2'"),
    ],
)
def test_lying_configurations(tmp_path, write_to, change, message):
    write_to(tmp_path / "model", "gptq")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    (config if "num_hidden_layers" in change else config["quantization_config"]).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "model")


def test_truncated_and_garbled_files(tmp_path, write_to):
    write_to(tmp_path / "model", "gptq")
    path = tmp_path / "model" / "model.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:100], b"", b"\xff" * 64, data[:8] + b"x" + data[9:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
            load_quantized(tmp_path / "model")
    path.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"no pickle is read")
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors"):
        load_quantized(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[" * 100000)
    with pytest.raises(ValueError, match="not JSON"):
        load_quantized(tmp_path / "model")
