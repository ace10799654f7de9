"""GGUF files: a header that is checked before anything believes it, then tensors on demand.

The ``gguf`` package trusts what it reads (a lying count makes it loop past the end of the file),
so files from elsewhere go through here first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.loaders.bitnet import I2S_TAIL, i2s_weight
from effinfer.quant.loaders.ggml import GGML_TYPES, ggml_weight

FLOAT_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
I2_S = 36  # bitnet.cpp's own number
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: its shape in torch's order, ggml type, and bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


class GgufFile:
    """A GGUF file (version 2 or 3, little-endian), its header read and found consistent.

    Attributes:
        path: the file.
        metadata: key to value; arrays as lists.
        tensors: name to ``GgufTensor``, in the file's order.

    Raises:
        ValueError: a header that is damaged or lies: sizes and counts past the end of the file,
            types unknown, tensors that overlap or are not whole blocks. The message names the
            file, the tensor or key, and what was expected.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.stat().st_size:
            raise ValueError(f"{self.path}: not a GGUF file, it is empty")
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        reader = _Reader(self._bytes, self.path)
        tensor_count, key_count = reader.preamble()
        self.metadata: Mapping[str, Any] = reader.metadata(key_count)
        self.tensors: Mapping[str, GgufTensor] = reader.tensors(tensor_count, self.metadata)

    def weight(self, name: str, *, i2s_block: int = 128) -> LowBitWeight:
        """A quantized matrix, bit for bit the ``gguf`` package's.

        Args:
            name: of a tensor with two dimensions in one of ``GGML_TYPES`` or I2_S.
            i2s_block: see ``i2s_weight``.

        Raises:
            ValueError: the type or shape is none of these, or scales are not finite.
        """
        info = self.tensors[name]
        where = f"{self.path}: {name}"
        if len(info.shape) != 2 or not (info.type in GGML_TYPES or info.type == I2_S):
            raise ValueError(
                f"{where} must be a matrix of a quantized type, got ggml type {info.type} "
                f"{info.shape}"
            )
        n, k = info.shape
        if info.type == I2_S:
            return i2s_weight(self._data(info), (n, k), block=i2s_block, name=where)
        return ggml_weight(self._data(info).reshape(n, -1), GGML_TYPES[info.type], where)

    def tensor(self, name: str) -> Tensor:
        """A tensor as floats: in its own dtype, or dequantized to float32."""
        info = self.tensors[name]
        if info.type in FLOAT_TYPES:
            return self._data(info).view(FLOAT_TYPES[info.type]).reshape(info.shape)
        if info.type == I2_S:
            return self.weight(name).dequantize()
        rows = self._data(info).reshape(math.prod(info.shape[:-1]), -1)
        weight = ggml_weight(rows, GGML_TYPES[info.type], f"{self.path}: {name}")
        return weight.dequantize().reshape(info.shape)

    def _data(self, info: GgufTensor) -> Tensor:
        return torch.from_numpy(self._bytes[info.start : info.start + info.size].copy())


class _Reader:
    """Walks a header; every read is checked against the end of the file."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]], path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path}: {message}")

    def take(self, size: int, what: str) -> bytes:
        left = len(self.data) - self.at
        if size > left:
            self.fail(f"{what} takes {size} bytes at {self.at}, but only {left} are left")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, least: int, code: str = "Q") -> int:
        """A number of things, of at least so many bytes each, that are still to come."""
        count = int(self.number(code, what))
        left = len(self.data) - self.at
        if count * least > left:
            self.fail(f"{what} is {count}, which {left} bytes left cannot hold")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.count(f"the length of {what}", 1), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def preamble(self) -> tuple[int, int]:
        if self.take(4, "the magic") != b"GGUF":
            self.fail("not a GGUF file, it does not start with GGUF")
        version = self.number("I", "the version")
        if version not in (2, 3):
            self.fail(f"version must be 2 or 3 in little-endian order, got {version}")
        return self.count("the number of tensors", 24), self.count("the number of keys", 13)

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in range(count):
            key = self.string(f"key {i}")
            if key in found:
                self.fail(f"key {key!r} appears twice")
            found[key] = self.value(self.number("I", f"the type of {key!r}"), repr(key))
        return found

    def value(self, type: int, what: str) -> Any:
        if type in _SCALARS:
            return self.number(_SCALARS[type], what)
        if type == _STRING:
            return self.string(what)
        if type != _ARRAY:
            self.fail(f"{what} has the unknown type {type}")
        inner = self.number("I", f"the element type of {what}")
        if inner == _STRING:
            return [self.string(what) for _ in range(self.count(f"the length of {what}", 8))]
        if inner not in _SCALARS:
            self.fail(f"{what} is an array of type {inner}, which is no number or string")
        size = struct.calcsize(f"<{_SCALARS[inner]}")
        length = self.count(f"the length of {what}", size)
        return list(struct.unpack(f"<{length}{_SCALARS[inner]}", self.take(length * size, what)))

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", 32)
        if alignment not in (1 << i for i in range(MAX_ALIGNMENT.bit_length())):
            self.fail(f"general.alignment must be a power of two, got {alignment!r}")
        entries = [self.entry(i) for i in range(count)]
        data_start = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, type, offset in entries:
            if name in found:
                self.fail(f"tensor {name!r} appears twice")
            if offset % alignment:
                self.fail(f"tensor {name!r} is not aligned to {alignment}: its offset is {offset}")
            size, start = self.size_of(name, shape, type), data_start + offset
            if start + size > len(self.data):
                self.fail(
                    f"tensor {name!r} must end by {len(self.data)}, the end of the file, "
                    f"got {start + size}"
                )
            found[name] = GgufTensor(name, shape, type, start, size)
        self.check_overlaps(found)
        return found

    def entry(self, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"the name of tensor {i}")
        dims = self.number("I", f"the dimensions of {name!r}")
        if not 1 <= dims <= MAX_DIMS:
            self.fail(f"tensor {name!r} must have 1 to {MAX_DIMS} dimensions, got {dims}")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims, f"the shape of {name!r}"))
        if 0 in shape:
            self.fail(f"tensor {name!r} must have elements, got shape {shape[::-1]}")
        return (
            name,
            shape[::-1],  # ggml's fastest dimension comes first
            self.number("I", f"the type of {name!r}"),
            self.number("Q", f"the offset of {name!r}"),
        )

    def size_of(self, name: str, shape: tuple[int, ...], type: int) -> int:
        count = math.prod(shape)
        if type in FLOAT_TYPES:
            return count * FLOAT_TYPES[type].itemsize
        if type == I2_S:
            return count // 4 + I2S_TAIL
        if type not in GGML_TYPES:
            known = ", ".join(f"{t.name} ({t.id})" for t in GGML_TYPES.values())
            self.fail(
                f"tensor {name!r} has ggml type {type}; known are F32 (0), F16 (1), BF16 (30), "
                f"I2_S ({I2_S}), {known}"
            )
        block = GGML_TYPES[type]
        if shape[-1] % block.block:
            self.fail(
                f"tensor {name!r} must have rows of whole {block.name} blocks ({block.block}), "
                f"got {shape[-1]}"
            )
        return count // block.block * block.block_bytes

    def check_overlaps(self, tensors: Mapping[str, GgufTensor]) -> None:
        """So that reading every tensor takes no more memory than the file's size allows for."""
        end, last = 0, ""
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            if tensor.start < end:
                self.fail(f"tensors {last!r} and {tensor.name!r} overlap")
            end, last = tensor.start + tensor.size, tensor.name
