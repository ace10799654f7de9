"""The ops: each a fast function with ``.reference`` (plain torch) and ``.isa()`` beside it."""

from effinfer.ops.linear import linear, pack_linear, unpack_linear
from effinfer.ops.rms_norm import rms_norm
from effinfer.ops.selective_scan import selective_scan
from effinfer.ops.selective_state_update import selective_state_update
from effinfer.ops.ssd import ssd
from effinfer.ops.ssd_state_update import ssd_state_update

__all__ = [
    "linear",
    "pack_linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "unpack_linear",
]
