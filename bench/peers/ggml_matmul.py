"""ggml's mul_mat on quantized weights, llama.cpp's and ik_llama.cpp's, copy by copy of the weight."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import weakref
from collections.abc import Callable

import torch

from bench.peers.common import PeerUnavailable
from bench.peers.ggml import F32, InitParams, Library
from bench.peers.lowbit_case import weight

# ggml_type of each, and of the plain type that a row-interleaved one (_r4, _r8) rearranges.
LLAMA_TYPES = {
    "q4_0": (2, 2),
    "q8_0": (8, 8),
    "q2_K": (10, 10),
    "q3_K": (11, 11),
    "q4_K": (12, 12),
    "tq1_0": (34, 34),
    "tq2_0": (35, 35),
    "q1_0": (41, 41),
}
IK_TYPES = {
    "q4_K": (12, 12),
    "iq1_bn": (134, 134),
    "iq2_bn": (135, 135),
    "q4_0_r8": (202, 2),
    "q8_0_r8": (208, 8),
    "q3_K_r4": (211, 11),
    "iq2_bn_r4": (335, 135),
}
REPACKED = ("q4_0", "q4_K")  # what llama.cpp's repacking buffer takes on AVX2


@functools.lru_cache(maxsize=8)
def quantized(
    library: Callable[[], Library], name: str, kind: str, outputs: int, inputs: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """ggml_type, bytes and dequantized float32 of a case's weight."""
    ggml = library()
    type_, plain = (IK_TYPES if ggml.is_fork else LLAMA_TYPES)[name]
    values = weight(kind, outputs, inputs)
    data = ggml.quantize(type_, values)
    plain_data = data if plain == type_ else ggml.quantize(plain, values)
    return type_, data, ggml.dequantize(plain, plain_data, inputs)


class MatMul:
    """x @ weight.T, each call on the next of `copies` copies of the quantized weight."""

    def __init__(
        self,
        ggml: Library,
        kind: int,
        data: torch.Tensor,
        x: torch.Tensor,
        threads: int,
        copies: int,
        *,
        repack: bool = False,
    ) -> None:
        self._ggml, self._call = ggml, ggml.call
        rows, columns = x.shape
        self._shape = (rows, data.shape[0])
        node_bytes = self._call["ggml_tensor_overhead"]() + 64
        graph_bytes = self._call["ggml_graph_overhead"]() + 64
        results = copies * (4 * math.prod(self._shape) + graph_bytes + node_bytes)
        weights = copies * (data.nbytes + node_bytes)
        self._context = self._new_context(x.nbytes + results + (0 if repack else weights))
        x_node = self._new(self._context, F32, columns, rows, x)
        nodes = [
            self._repacked(kind, columns, data)
            if repack
            else self._new(self._context, kind, columns, data.shape[0], data)
            for _ in range(copies)
        ]
        self._results = [self._call["ggml_mul_mat"](self._context, w, x_node) for w in nodes]
        self._graphs = [self._graph(result) for result in self._results]
        plans = [ggml.plan(graph, threads) for graph in self._graphs]
        self._work = ctypes.create_string_buffer(max(plan.work_size for plan in plans) + 64)
        for plan in plans:
            plan.work_data = (ctypes.addressof(self._work) + 63) // 64 * 64
        self._turn = itertools.cycle(zip(self._graphs, plans, self._results, strict=True))

    def _new_context(self, size: int, *, no_alloc: bool = False) -> int:
        context = self._call["ggml_init"](InitParams(size + (1 << 20), None, no_alloc))
        weakref.finalize(self, self._call["ggml_free"], context)
        return context

    def _new(self, context: int, kind: int, width: int, height: int, data: torch.Tensor) -> int:
        node = self._call["ggml_new_tensor_4d"](context, kind, width, height, 1, 1)
        if self._call["ggml_nbytes"](node) != data.nbytes:
            raise RuntimeError(f"{self._ggml.name}: type {kind} has another size than its bytes")
        ctypes.memmove(self._call["ggml_get_data"](node), data.data_ptr(), data.nbytes)
        return node

    def _repacked(self, kind: int, columns: int, data: torch.Tensor) -> int:
        """A weight in llama.cpp's repacking buffer, which rearranges what is set into it."""
        context = self._new_context(1024, no_alloc=True)
        node = self._call["ggml_new_tensor_4d"](context, kind, columns, data.shape[0], 1, 1)
        kind_of_buffer = self._call["_Z35ggml_backend_cpu_repack_buffer_typev"]()
        buffer = self._call["ggml_backend_buft_alloc_buffer"](kind_of_buffer, data.nbytes)
        weakref.finalize(self, self._call["ggml_backend_buffer_free"], buffer)
        base = self._call["ggml_backend_buffer_get_base"](buffer)
        self._call["ggml_backend_tensor_alloc"](buffer, node, base)
        self._call["ggml_backend_tensor_set"](node, data.data_ptr(), 0, data.nbytes)
        return node

    def _graph(self, result: int) -> int:
        graph = self._call["ggml_new_graph"](self._context)
        self._call["ggml_build_forward_expand"](graph, result)
        return graph

    def run(self) -> None:
        graph, plan, self._last = next(self._turn)
        if self._call["ggml_graph_compute"](graph, ctypes.byref(plan)) != 0:
            raise RuntimeError(f"{self._ggml.name}: ggml_graph_compute failed")

    def result(self) -> torch.Tensor:
        """What the last run computed, copied out of ggml's memory."""
        pointer = self._call["ggml_get_data"](self._last)
        buffer = (ctypes.c_float * math.prod(self._shape)).from_address(pointer)
        return torch.frombuffer(buffer, dtype=torch.float32).view(self._shape).clone()


def check_type(ggml: Library, name: str, *, repack: bool) -> None:
    """Raise PeerUnavailable for a type that this ggml does not have, or not repacked."""
    known = IK_TYPES if ggml.is_fork else LLAMA_TYPES
    if name not in known or (repack and (ggml.is_fork or name not in REPACKED)):
        raise PeerUnavailable(f"{ggml.name} has no {name}{' repacked' if repack else ''} here")
