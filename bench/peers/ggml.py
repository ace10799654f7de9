"""Single ggml operators run through ggml's shared libraries: llama.cpp's, or ik_llama.cpp's fork."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from ctypes import POINTER, c_bool, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.peers.common import PeerUnavailable, peers_dir
from bench.peers.llama import load_llama_cpp

F32, I32 = 0, 26  # ggml_type
# The fork's iq1_bn and iq2_bn begin each row with its scale, which their to_float leaves out.
ROW_SCALES = {134: torch.float16, 135: torch.float32}


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


class _ForkPlan(ctypes.Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("moe_expert_prefetch", c_bool),
    ]


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", c_int64),
        ("block_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]


class _ForkTraits(ctypes.Structure):  # returned by value, so all of it counts
    _fields_ = [*_Traits._fields_, ("rest", c_void_p * 10)]


_Log = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
_quiet = _Log(lambda *_: None)

_Signature = tuple[Any, list[Any]]

_COMMON: dict[str, _Signature] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_tensor_overhead": (c_size_t, []),
}

_LLAMA: dict[str, _Signature] = {
    **_COMMON,
    "ggml_reshape_4d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]),
    "ggml_view_4d": (c_void_p, [c_void_p] * 2 + [c_int64] * 4 + [c_size_t] * 4),
    "ggml_ssm_scan": (c_void_p, [c_void_p] * 8 + [c_int64]),
    "ggml_ssm_conv": (c_void_p, [c_void_p] * 3),
    "ggml_concat": (c_void_p, [c_void_p] * 3 + [c_int]),
    "ggml_transpose": (c_void_p, [c_void_p] * 2),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_silu": (c_void_p, [c_void_p] * 2),
    "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
    "ggml_quantize_chunk": (c_size_t, [c_int] + [c_void_p] * 2 + [c_int64] * 3 + [c_void_p]),
    "ggml_get_type_traits": (POINTER(_Traits), [c_int]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p] * 3),
    "ggml_backend_tensor_set": (None, [c_void_p] * 2 + [c_size_t] * 2),
    "ggml_cpu_init": (None, []),
    "ggml_log_set": (None, [_Log, c_void_p]),
    # ggml_backend_cpu_repack_buffer_type(), which has C++ linkage
    "_Z35ggml_backend_cpu_repack_buffer_typev": (c_void_p, []),
}

_FORK: dict[str, _Signature] = {
    **_COMMON,
    "ggml_graph_plan": (_ForkPlan, [c_void_p, c_int]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_ForkPlan)]),
    "ggml_quantize_chunk": (c_size_t, [c_int] + [c_void_p] * 2 + [c_int64] * 3 + [c_void_p] * 2),
    "ggml_internal_get_type_traits": (_ForkTraits, [c_int]),
}


@dataclass(frozen=True)
class Library:
    """One build of ggml: its functions, called by name."""

    name: str
    call: Mapping[str, Any]
    is_fork: bool = False  # ik_llama.cpp parted before some of the functions took their arguments

    def plan(self, graph: int, threads: int) -> Any:
        pool = () if self.is_fork else (None,)
        return self.call["ggml_graph_plan"](graph, threads, *pool)

    def quantize(self, kind: int, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (rows, columns) float32 in a quantized type, as bytes (rows, row size)."""
        rows, columns = weight.shape
        out = torch.zeros(rows, self.call["ggml_row_size"](kind, columns), dtype=torch.uint8)
        user_data = (None,) if self.is_fork else ()
        weight = weight.contiguous()
        operands = (weight.data_ptr(), out.data_ptr(), 0, rows, columns, None, *user_data)
        if not self.call["ggml_quantize_chunk"](kind, *operands):
            raise PeerUnavailable(f"{self.name}: nothing quantized to type {kind}")
        return out

    def dequantize(self, kind: int, data: torch.Tensor, columns: int) -> torch.Tensor:
        """Bytes of quantize() as float32 (rows, columns), row by row by ggml's own function."""
        scales = ROW_SCALES[kind] if self.is_fork and kind in ROW_SCALES else None
        head = scales.itemsize if scales else 0
        if self.is_fork:
            traits = self.call["ggml_internal_get_type_traits"](kind)
        else:
            traits = self.call["ggml_get_type_traits"](kind).contents
        out = torch.empty(data.shape[0], columns)
        for row, values in zip(data, out, strict=True):
            traits.to_float(row.data_ptr() + head, values.data_ptr(), columns)
        if scales:
            out *= data[:, :head].contiguous().view(scales)
        return out


def _bind(path: Path, signatures: Mapping[str, _Signature]) -> dict[str, Any]:
    """Functions of the library, or of what it is linked with."""
    library = ctypes.CDLL(str(path))
    functions = {}
    for name, (result, arguments) in signatures.items():
        function = functions[name] = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return functions


@functools.cache
def llama_ggml() -> Library:
    """llama.cpp's, out of llama-cpp-python."""
    folder = Path(load_llama_cpp().__file__).parent / "lib"
    library = Library("llama.cpp", _bind(folder / "libggml-cpu.so", _LLAMA))
    library.call["ggml_log_set"](_quiet, None)  # repacking reports every tensor
    library.call["ggml_cpu_init"]()
    return library


@functools.cache
def ik_ggml() -> Library:
    """ik_llama.cpp's, from ik/libggml.so among the peers."""
    path = peers_dir() / "ik" / "libggml.so"
    if not path.exists():
        raise PeerUnavailable("no ik/libggml.so (ik_llama.cpp's ggml) beside the other peers")
    library = Library("ik_llama.cpp", _bind(path, _FORK), is_fork=True)
    # The first context fills the tables that quantizing reads.
    library.call["ggml_free"](library.call["ggml_init"](InitParams(1024, None, False)))
    return library


class Graph:
    """A small ggml graph over copies of torch tensors; sizes are ggml's (fastest axis first)."""

    def __init__(self, megabytes: int, threads: int) -> None:
        self._library = llama_ggml()
        self._call = self._library.call
        self._context = self._call["ggml_init"](InitParams(megabytes << 20, None, False))
        self._threads = threads

    def tensor(self, values: torch.Tensor) -> int:
        """A leaf holding `values`, whose axes are ggml's reversed."""
        sizes = [*reversed(values.shape), 1, 1, 1][:4]
        kind = I32 if values.dtype == torch.int32 else F32
        node = self._call["ggml_new_tensor_4d"](self._context, kind, *sizes)
        values = values.contiguous()
        ctypes.memmove(self._call["ggml_get_data"](node), values.data_ptr(), values.nbytes)
        return node

    def op(self, name: str, *operands: int) -> int:
        return self._call[f"ggml_{name}"](self._context, *operands)

    def concat(self, left: int, right: int, axis: int) -> int:
        return self._call["ggml_concat"](self._context, left, right, axis)

    def finish(self, node: int) -> None:
        """Plans the computation of `node`; run() then allocates nothing."""
        self._graph = self._call["ggml_new_graph"](self._context)
        self._call["ggml_build_forward_expand"](self._graph, node)
        self._plan = self._library.plan(self._graph, self._threads)
        self._work = ctypes.create_string_buffer(self._plan.work_size + 1)
        self._plan.work_data = ctypes.addressof(self._work)

    def run(self) -> None:
        if self._call["ggml_graph_compute"](self._graph, ctypes.byref(self._plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")

    def read(self, node: int, *shape: int) -> torch.Tensor:
        """The first values of a computed node, as a view of ggml's memory."""
        pointer = self._call["ggml_get_data"](node)
        buffer = (ctypes.c_float * math.prod(shape)).from_address(pointer)
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape)
