"""GGUF files: written by the ``gguf`` package, read by it and here; then damaged and lying ones."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effinfer.quant.loaders import GGML_TYPES
from effinfer.quant.loaders.gguf_file import GgufFile
from tests.quant.loaders.test_bitnet import pack_i2s, ternary
from tests.quant.loaders.test_ggml import random_blocks


def write(path, tensors, metadata=()):
    """tensors: name to float array, or (raw bytes, ggml type)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])
    writer.add_array("llama.counts", [1, -2, 3])
    for key, value in metadata:
        writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            raw, type = tensor
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(type))
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    rng = np.random.default_rng(0)
    tensors = {
        f"{type.name}.weight": (random_blocks(type, rows=3, blocks=2, seed=type.id), type.id)
        for type in GGML_TYPES.values()
    }
    tensors["norm.weight"] = rng.standard_normal(48).astype(np.float32)
    tensors["half.weight"] = rng.standard_normal((4, 8)).astype(np.float16)
    experts = random_blocks(GGML_TYPES[8], rows=6, blocks=2).reshape(2, 3, -1)
    tensors["experts.weight"] = (experts, 8)
    return write(tmp_path_factory.mktemp("gguf") / "every.gguf", tensors)


def read_by_gguf(path):
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors
    }


def test_every_tensor_is_what_gguf_reads(every_type):
    file = GgufFile(every_type)
    reference = read_by_gguf(every_type)
    assert list(file.tensors) == list(reference)
    for name, expected in reference.items():
        found = file.tensor(name).float().numpy()
        assert found.shape == expected.shape
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
        if name.split(".")[0] in {t.name for t in GGML_TYPES.values()}:
            assert torch.equal(file.weight(name).dequantize(), torch.from_numpy(expected.copy()))


def test_metadata(every_type):
    metadata = GgufFile(every_type).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == ["a", "bé", ""]
    assert metadata["llama.counts"] == [1, -2, 3]


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def entry(name, dims, type, offset):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)


def header(entries, keys=b"", key_count=0, tensor_count=None, version=3):
    count = len(entries) if tensor_count is None else tensor_count
    data = b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + b"".join(entries)
    return data + bytes(-len(data) % 32)


def test_i2_s_is_bitnet_cpps(tmp_path):
    values = ternary(4, 128)
    data = bytes(pack_i2s(values, 0.25, 128).tolist())
    path = tmp_path / "i2s.gguf"
    path.write_bytes(header([entry("w", (128, 4), 36, 0)]) + data)
    file = GgufFile(path)
    assert torch.equal(file.weight("w").dequantize(), values * 0.25)
    assert torch.equal(file.tensor("w"), values * 0.25)


HUGE = 2**63


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file, it is empty"),
        (b"PK\x03\x04" + bytes(60), "does not start with GGUF"),
        (header([])[:15], "the number of tensors takes 8 bytes at 8, but only 7 are left"),
        (header([], version=0x03000000), "version must be 2 or 3 in little-endian order"),
        (header([], tensor_count=HUGE), "the number of tensors is 9223372036854775808, which"),
        (header([], key_count=HUGE), "the number of keys is"),
        (header([], struct.pack("<Q8x", HUGE), 1), "the length of key 0 is"),
        (header([], string("k") + struct.pack("<I", 99), 1), "'k' has the unknown type 99"),
        (header([], string("k") + struct.pack("<IIQ", 9, 0, HUGE), 1), "the length of 'k' is"),
        (header([], string("k") + struct.pack("<IIQ", 9, 8, HUGE), 1), "the length of 'k' is"),
        (header([], string("k") + struct.pack("<IIQ", 9, 9, 1), 1), "'k' is an array of type 9"),
        (
            header([], (string("k") + struct.pack("<II", 4, 1)) * 2, 2),
            "key 'k' appears twice",
        ),
        (
            header([], string("general.alignment") + struct.pack("<II", 4, 24), 1),
            "general.alignment must be a power of two, got 24",
        ),
        (header([entry("w", (32,) * 5, 0, 0)]), "'w' must have 1 to 4 dimensions, got 5"),
        (header([entry("w", (0,), 0, 0)]), r"'w' must have elements, got shape \(0,\)"),
        (header([entry("w", (4,), 0, 0)] * 2) + bytes(16), "tensor 'w' appears twice"),
        (header([entry("w", (4,), 0, 8)]) + bytes(64), "'w' is not aligned to 32"),
        (header([entry("w", (4,), 77, 0)]) + bytes(16), "'w' has ggml type 77; known are"),
        (
            header([entry("w", (33, 2), 8, 0)]) + bytes(96),
            "'w' must have rows of whole Q8_0 blocks",
        ),
        (header([entry("w", (HUGE, 4), 0, 0)]) + bytes(16), "'w' must end by 112, the end"),
        (header([entry("w", (4,), 0, 32 * HUGE // 64)]) + bytes(16), "'w' must end by"),
        (header([entry("w", (5,), 0, 0)]) + bytes(16), "'w' must end by"),
        (
            header([entry("v", (16,), 0, 0), entry("w", (4,), 0, 32)]) + bytes(64),
            "tensors 'v' and 'w' overlap",
        ),
    ],
)
def test_a_lying_header_is_an_error_naming_it(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


def test_what_has_no_codes(every_type):
    file = GgufFile(every_type)
    for name in ("norm.weight", "half.weight", "experts.weight"):
        with pytest.raises(ValueError, match=f"{name} must be a matrix of a quantized type"):
            file.weight(name)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**20),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=6),
)
def test_damage_is_an_error_or_read_as_gguf_does(every_type, tmp_path_factory, cut, changes):
    """Bytes changed, most of them in the header, and the end cut off."""
    data = bytearray(every_type.read_bytes())
    data = data[: len(data) - cut % len(data)] if cut % 3 == 0 else data
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    try:
        file = GgufFile(path)
        found = {name: file.tensor(name).float().numpy() for name in file.tensors}
    except ValueError:
        return
    if any(tensor.type == 36 for tensor in file.tensors.values()):
        return  # the package does not know it
    for name, expected in read_by_gguf(path).items():
        assert np.array_equal(found[name].view(np.uint32), expected.view(np.uint32))
