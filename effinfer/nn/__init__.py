"""Modules and mixins over ``effinfer.ops``, shared by patched models and the engine."""

from effinfer.nn.ab_bnn import ABBlock, ABShortcut, from_fixed, to_fixed
from effinfer.nn.binary import BinaryConv2d, BinaryLinear
from effinfer.nn.linear import PackedLinear
from effinfer.nn.lowbit import LowBitLinear
from effinfer.nn.mamba1 import Mamba1Mixer
from effinfer.nn.mamba2 import Mamba2Mixer

__all__ = [
    "ABBlock",
    "ABShortcut",
    "BinaryConv2d",
    "BinaryLinear",
    "LowBitLinear",
    "Mamba1Mixer",
    "Mamba2Mixer",
    "PackedLinear",
    "from_fixed",
    "to_fixed",
]
