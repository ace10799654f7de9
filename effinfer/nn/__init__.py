"""Modules and mixins over ``effinfer.ops``, shared by patched models and the engine."""

from effinfer.nn.linear import PackedLinear
from effinfer.nn.lowbit import LowBitLinear
from effinfer.nn.mamba1 import Mamba1Mixer
from effinfer.nn.mamba2 import Mamba2Mixer

__all__ = ["LowBitLinear", "Mamba1Mixer", "Mamba2Mixer", "PackedLinear"]
