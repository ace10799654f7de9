"""Checkpoint formats of others, read as ``LowBitWeight``: bit for bit what their makers compute."""

from effinfer.quant.loaders.awq import awq_weight
from effinfer.quant.loaders.bitnet import bitnet_online_weight, bitnet_weight, i2s_weight
from effinfer.quant.loaders.ggml import GGML_TYPES, GgmlType, ggml_weight
from effinfer.quant.loaders.gguf_file import GgufFile, GgufTensor
from effinfer.quant.loaders.gptq import gptq_weight
from effinfer.quant.loaders.hqq import hqq_dense, hqq_weight
from effinfer.quant.loaders.int4pack import int4pack_weight
from effinfer.quant.loaders.load import load_quantized

__all__ = [
    "GGML_TYPES",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "awq_weight",
    "bitnet_online_weight",
    "bitnet_weight",
    "ggml_weight",
    "gptq_weight",
    "hqq_dense",
    "hqq_weight",
    "i2s_weight",
    "int4pack_weight",
    "load_quantized",
]
