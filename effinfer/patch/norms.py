"""The RMS norms of the patched families; each computes in float32 and rounds once."""

from __future__ import annotations

import torch
from torch import nn

from effinfer import ops
from effinfer.patch.swap import Patched


class RMSNorm(Patched):
    """``weight * x / rms(x)``."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class WeightlessRMSNorm(Patched):
    """``x / rms(x)``."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return ops.rms_norm(x, None, self.eps)


class GatedRMSNorm(Patched):
    """Mamba-2's norm of ``x * silu(gate)``, over groups of channels."""

    weight: torch.Tensor
    variance_epsilon: float
    # Some families had one group, and no such attribute, before transformers 5.20.
    group_size: int | None = None

    def forward(
        self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gate, then normalise each group of the last dimension."""
        return ops.gated_rms_norm(
            hidden_states, self.weight, gate, self.variance_epsilon, group_size=self.group_size
        )


class FalconH1GatedRMSNorm(Patched):
    """Falcon-H1's gated norm: the gate may come after, and groups are counted, not sized."""

    weight: torch.Tensor
    variance_epsilon: float
    n_groups: int
    norm_before_gate: bool

    def forward(
        self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise each group of the last dimension, gating before or after."""
        return ops.gated_rms_norm(
            hidden_states,
            self.weight,
            gate,
            self.variance_epsilon,
            group_size=hidden_states.shape[-1] // self.n_groups,
            norm_before_gate=self.norm_before_gate,
        )


def norm_reasons(module: nn.Module) -> list[str]:
    """Why this norm cannot run on effinfer's ops."""
    if module.weight.dtype == torch.float64:
        return ["weight is float64; the ops compute in float32"]
    return []
