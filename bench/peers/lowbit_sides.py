"""Peers' low-bit linears as sides: torch's own, FBGEMM, int4pack, ONNX Runtime, ggml, bitnet.cpp.

Each quantizes the case's weight in its own format and is held to float64 of its own dequantized
weight. Few rows walk over copies of the weight, so that every byte comes from DRAM.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.peers import ggml_matmul
from bench.peers.common import PeerUnavailable, Side, peers_dir
from bench.peers.ggml import Library, ik_ggml, llama_ggml
from bench.peers.lowbit_case import Case


def torch_f32(case: Case) -> Side:
    x, w = case.x(), case.weight()
    turn = case.turns(w, w.nbytes, torch.clone)
    return Side(lambda: F.linear(x, turn()), None, case.truth(w), w.nbytes)


def fbgemm(case: Case) -> Side:
    """quantize_dynamic's product: int8 weights per channel, 7-bit activations per tensor."""
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    x, w = case.x(), case.weight()
    scales = w.abs().amax(1) / 127
    zeros = torch.zeros(case.outputs, dtype=torch.int64)
    quantized = torch.quantize_per_channel(w, scales.double(), zeros, 0, torch.qint8)
    pack = torch.ops.quantized.linear_prepack
    turn = case.turns(pack(quantized, None), w.numel(), lambda _: pack(quantized, None))
    product = torch.ops.quantized.linear_dynamic
    truth = case.truth(quantized.dequantize())
    return Side(lambda: product(x, turn(), True), None, truth, w.numel())


def int4pack(case: Case, dtype: torch.dtype = torch.bfloat16, group: int = 128) -> Side:
    """torch's weight-only int4 product; float32 is offered too, but many times slower."""
    x, w = case.x().to(dtype), case.weight()
    grouped = w.view(case.outputs, -1, group)
    scale = (grouped.abs().amax(2) / 7.5).to(dtype).float()
    codes = ((grouped / scale[..., None]).round() + 8).clamp(0, 15)
    dequantized = ((codes - 8) * scale[..., None]).view_as(w)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view_as(w).int(), 1)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], 2).to(dtype).contiguous()
    read = packed.nbytes + scales.nbytes
    turn = case.turns((packed, scales), read, lambda both: tuple(map(torch.clone, both)))

    def run() -> torch.Tensor:
        codes, scales = turn()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

    return Side(run, None, case.truth(dequantized, x), read)


def ggml(case: Case, library: Callable[[], Library], name: str, *, repack: bool = False) -> Side:
    """ggml_mul_mat; activations are quantized by ggml in each call."""
    ggml_matmul.check_type(library(), name, repack=repack)
    x = case.x()
    kind, data, dequantized = ggml_matmul.quantized(
        library, name, case.kind, case.outputs, case.inputs
    )
    product = ggml_matmul.MatMul(
        library(), kind, data, x, case.threads, case.copies(data.nbytes), repack=repack
    )
    return Side(product.run, product.result, case.truth(dequantized), data.nbytes)


def llama(name: str, *, repack: bool = False) -> Callable[[Case], Side]:
    return lambda case: ggml(case, llama_ggml, name, repack=repack)


def ik(name: str) -> Callable[[Case], Side]:
    return lambda case: ggml(case, ik_ggml, name)


def bitnet(case: Case) -> Side:
    """bitnet.cpp's I2_S products of integers, 128 codes in 32 bytes; activations come quantized.

    bitnet/libbitnet.so has its vec_dot kernel under the loops of its own kernel benchmark, the
    columns shared out among threads. Quantizing x and applying scales are not in its time.
    """
    path = peers_dir() / "bitnet" / "libbitnet.so"
    if not path.exists():
        raise PeerUnavailable("no bitnet/libbitnet.so (bitnet.cpp's kernels) beside the peers")
    product = ctypes.CDLL(str(path)).bitnet_gemm
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    product.argtypes = [integer, pointer, ctypes.c_size_t, pointer, pointer, *[integer] * 3]
    product.restype = None
    x = case.x()
    q = (x * (127 / x.abs().amax(1, keepdim=True))).round().to(torch.int8)
    codes = case.weight().sign().add(1).to(torch.uint8)
    parts = codes.view(case.outputs, case.inputs // 128, 4, 32).unbind(2)
    packed = parts[0] << 6 | parts[1] << 4 | parts[2] << 2 | parts[3]
    turn = case.turns(packed, packed.nbytes, torch.clone)
    y = torch.empty(case.rows, case.outputs)
    sizes = (case.rows, case.outputs, case.threads)

    def run() -> torch.Tensor:
        product(case.inputs, y.data_ptr(), case.outputs, turn().data_ptr(), q.data_ptr(), *sizes)
        return y

    return Side(run, None, case.truth(codes, q), packed.nbytes)


def tmac(case: Case) -> Side:
    """T-MAC: named in every result, so that its absence is."""
    raise PeerUnavailable("T-MAC's kernels are written by TVM's code generator, which is not here")
