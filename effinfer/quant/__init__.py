"""Quantization: weights in, low-bit weights out."""

from effinfer.quant.config import QuantConfig
from effinfer.quant.rtn import rtn

__all__ = ["QuantConfig", "rtn"]
