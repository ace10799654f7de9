"""The ops: each a fast function with ``.reference`` (plain torch) and ``.isa()`` beside it."""

from effinfer.ops.binary_conv2d import (
    binary_conv2d,
    pack_binary_conv2d,
    unpack_binary_conv2d,
)
from effinfer.ops.binary_conv2d_fixed import binary_conv2d_fixed
from effinfer.ops.binary_linear import (
    binary_linear,
    pack_binary,
    pack_signs,
    unpack_binary,
    unpack_signs,
)
from effinfer.ops.causal_conv1d import causal_conv1d
from effinfer.ops.causal_conv1d_update import causal_conv1d_update
from effinfer.ops.gated_rms_norm import gated_rms_norm
from effinfer.ops.hidden_attention import hidden_attention
from effinfer.ops.layer_norm import layer_norm
from effinfer.ops.linear import linear, pack_linear, unpack_linear
from effinfer.ops.low_rank_add import low_rank_add, pack_low_rank
from effinfer.ops.lowbit_linear import PackedLowBit, lowbit_linear, pack_lowbit, unpack_lowbit
from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.ops.moe_experts import moe_experts, pack_experts, unpack_experts
from effinfer.ops.paged_attention import paged_attention
from effinfer.ops.rms_norm import rms_norm
from effinfer.ops.rope_write import rope_write
from effinfer.ops.selective_scan import selective_scan
from effinfer.ops.selective_scan_lmu import lmu_matrices, selective_scan_lmu
from effinfer.ops.selective_scan_lti import discretize, selective_scan_lti
from effinfer.ops.selective_scan_s5 import selective_scan_s5
from effinfer.ops.selective_state_update import selective_state_update
from effinfer.ops.silu_mul import silu_mul
from effinfer.ops.softmax_top2 import softmax_top2
from effinfer.ops.ssd import ssd
from effinfer.ops.ssd_state_update import ssd_state_update
from effinfer.ops.state_copy import (
    state_copy,
    state_fork,
    state_gather,
    state_rollback,
    state_scatter,
)

__all__ = [
    "LowBitWeight",
    "PackedLowBit",
    "binary_conv2d",
    "binary_conv2d_fixed",
    "binary_linear",
    "causal_conv1d",
    "causal_conv1d_update",
    "discretize",
    "gated_rms_norm",
    "hidden_attention",
    "layer_norm",
    "linear",
    "lmu_matrices",
    "low_rank_add",
    "lowbit_linear",
    "moe_experts",
    "pack_binary",
    "pack_binary_conv2d",
    "pack_experts",
    "pack_linear",
    "pack_low_rank",
    "pack_lowbit",
    "pack_signs",
    "paged_attention",
    "rms_norm",
    "rope_write",
    "selective_scan",
    "selective_scan_lmu",
    "selective_scan_lti",
    "selective_scan_s5",
    "selective_state_update",
    "silu_mul",
    "softmax_top2",
    "ssd",
    "ssd_state_update",
    "state_copy",
    "state_fork",
    "state_gather",
    "state_rollback",
    "state_scatter",
    "unpack_binary",
    "unpack_binary_conv2d",
    "unpack_experts",
    "unpack_linear",
    "unpack_lowbit",
    "unpack_signs",
]
