"""Single ggml operators (ssm_scan, ssm_conv) run through llama.cpp's own shared libraries."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from bench.peers.llama import load_llama_cpp

F32, I32 = 0, 26  # ggml_type


class _InitParams(ctypes.Structure):
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


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
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
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, ctypes.POINTER(_Plan)]),
}


def _library() -> dict[str, ctypes._CFuncPtr]:
    folder = Path(load_llama_cpp().__file__).parent / "lib"
    libraries = [ctypes.CDLL(str(folder / f"libggml{part}.so")) for part in ("-base", "-cpu")]
    functions = {}
    for name, (result, arguments) in _SIGNATURES.items():
        owner = next(library for library in libraries if hasattr(library, name))
        function = getattr(owner, name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    libraries[1].ggml_cpu_init()
    return functions


class Graph:
    """A small ggml graph over copies of torch tensors; sizes are ggml's (fastest axis first)."""

    def __init__(self, megabytes: int, threads: int) -> None:
        self._call = _library()
        self._context = self._call["ggml_init"](_InitParams(megabytes << 20, None, False))
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
        self._plan = self._call["ggml_graph_plan"](self._graph, self._threads, None)
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
