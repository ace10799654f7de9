"""Quantization: weights in, low-bit weights out."""

from effinfer.quant.config import QuantConfig, register_with_transformers
from effinfer.quant.costs import measure_times, packed_bytes
from effinfer.quant.gptq import gptq
from effinfer.quant.loaders import load_quantized
from effinfer.quant.plan import plan_bits
from effinfer.quant.quantease import gptq_then_quantease, output_error, quantease
from effinfer.quant.quantize import quantize_, quantize_linear
from effinfer.quant.report import QuantReport
from effinfer.quant.rtn import rtn

__all__ = [
    "QuantConfig",
    "QuantReport",
    "gptq",
    "gptq_then_quantease",
    "load_quantized",
    "measure_times",
    "output_error",
    "packed_bytes",
    "plan_bits",
    "quantease",
    "quantize_",
    "quantize_linear",
    "register_with_transformers",
    "rtn",
]
