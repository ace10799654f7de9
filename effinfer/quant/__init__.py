"""Quantization: weights in, low-bit weights out."""
