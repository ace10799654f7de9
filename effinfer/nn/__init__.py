"""Thin modules over the ops."""

from effinfer.nn.linear import PackedLinear

__all__ = ["PackedLinear"]
