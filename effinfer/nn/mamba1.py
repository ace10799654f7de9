"""The Mamba-1 mixer over effinfer's ops, as methods over the attributes its owner has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from effinfer import ops
from effinfer.nn.conv import conv_parameters, convolve
from effinfer.nn.stamp import derived

Constants = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class Mamba1Mixer:
    """``scan`` and ``step`` of a Mamba-1 mixer (arXiv 2312.00752), to be mixed into a module.

    Everything stays time-major: what the projections give as (B, L, D) reaches the ops as (B, D, L)
    views with channel stride 1, and nothing is transposed or copied in between.
    """

    in_proj: Callable[[torch.Tensor], torch.Tensor]
    x_proj: Callable[[torch.Tensor], torch.Tensor]
    dt_proj: Callable[[torch.Tensor], torch.Tensor]
    out_proj: Callable[[torch.Tensor], torch.Tensor]
    conv1d: nn.Conv1d
    activation: str
    A_log: torch.Tensor
    D: torch.Tensor
    time_step_rank: int
    ssm_state_size: int

    def _constants(self) -> Constants:
        """A, D, the convolution's weight and its bias as the ops want them."""
        assert isinstance(self, nn.Module)
        weights = (self.A_log, self.D, self.conv1d.weight, self.conv1d.bias)
        return derived(self, weights, self._build_constants)

    def _build_constants(self) -> Constants:
        return -torch.exp(self.A_log.float()), self.D.float(), *conv_parameters(self.conv1d)

    def normalise(
        self, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What some families do to dt, B and C after ``x_proj``; plain Mamba does nothing."""
        return dt, B, C

    def _select(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The input-dependent (..., D) dt, before its softplus, and (..., N) B and C."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.normalise(*torch.split(self.x_proj(x), sizes, dim=-1))
        return self.dt_proj(dt), B, C

    def scan(
        self,
        hidden: torch.Tensor,
        conv_state: torch.Tensor | None = None,
        ssm_state: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H) from the given states: output, and both states after it."""
        A, D, weight, bias = self._constants()
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x, conv_state = convolve(x, weight, bias, self.activation, conv_state, mask)
        dt, B, C = self._select(x.transpose(1, 2))
        y, ssm_state = ops.selective_scan(
            x,
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z,
            delta_softplus=True,
            initial_state=ssm_state,
            mask=mask,
        )
        return self.out_proj(y.transpose(1, 2)), conv_state, ssm_state

    def step(
        self,
        hidden: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token (B, 1, H); both states move on in place, those in ``slots`` (B,) where given."""
        A, D, weight, bias = self._constants()
        x, z = self.in_proj(hidden[:, 0]).chunk(2, dim=-1)
        x = ops.causal_conv1d_update(
            x, conv_state, weight, bias, self.activation, state_indices=slots
        )
        dt, B, C = self._select(x)
        y = ops.selective_state_update(
            ssm_state, x, dt, A, B, C, D, z, dt_softplus=True, state_indices=slots
        )
        return self.out_proj(y).unsqueeze(1)
