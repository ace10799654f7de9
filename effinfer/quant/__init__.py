"""Quantization: weights in, low-bit weights out."""

from effinfer.quant.config import QuantConfig
from effinfer.quant.costs import measure_times, packed_bytes
from effinfer.quant.plan import plan_bits
from effinfer.quant.rtn import rtn

__all__ = ["QuantConfig", "measure_times", "packed_bytes", "plan_bits", "rtn"]
