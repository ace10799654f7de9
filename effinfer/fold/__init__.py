"""Exact rewrites of a model that make it easier to quantize: the same function in other weights.

Each fold says in its report what it changed and what it refused, with the reasons; a refused part
is as it was.
"""

from effinfer.fold.pairs import Pair, find_pairs
from effinfer.fold.reparameterize import reparameterize
from effinfer.fold.report import Folded, FoldReport, Refused
from effinfer.fold.rms_norm import BiasedRMSNorm, ResidualStream, find_stream, to_rms_norm
from effinfer.fold.scale import move_scale, smooth

__all__ = [
    "BiasedRMSNorm",
    "FoldReport",
    "Folded",
    "Pair",
    "Refused",
    "ResidualStream",
    "find_pairs",
    "find_stream",
    "move_scale",
    "reparameterize",
    "smooth",
    "to_rms_norm",
]
