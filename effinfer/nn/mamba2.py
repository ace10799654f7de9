"""The Mamba-2 mixer over effinfer's ops, as methods over the attributes its owner has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from effinfer import ops
from effinfer.nn.conv import conv_parameters, convolve
from effinfer.nn.stamp import derived

Constants = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class Mamba2Mixer:
    """``scan`` and ``step`` of a Mamba-2 mixer (arXiv 2405.21060), to be mixed into a module."""

    in_proj: Callable[[torch.Tensor], torch.Tensor]
    out_proj: Callable[[torch.Tensor], torch.Tensor]
    norm: nn.Module
    conv1d: nn.Conv1d
    activation: str
    A_log: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    time_step_limit: Sequence[float]
    intermediate_size: int
    conv_dim: int
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int

    def _constants(self) -> Constants:
        """A, D, the step bias, the convolution's weight and its bias as the ops want them."""
        assert isinstance(self, nn.Module)
        conv = self.conv1d
        weights = (self.A_log, self.D, self.dt_bias, conv.weight, conv.bias)
        return derived(self, weights, self._build_constants)

    def _build_constants(self) -> Constants:
        A = -torch.exp(self.A_log.float())
        return A, self.D.float(), self.dt_bias.float(), *conv_parameters(self.conv1d)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gate, convolution input and time step, side by side."""
        return self.in_proj(hidden)

    def dt_limit(self) -> tuple[float, float]:
        """Bounds of the time step after its softplus, in prefill and in decoding alike."""
        low, high = self.time_step_limit
        return float(low), float(high)

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, x, dt = torch.split(
            projected, [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        return gate, x, dt

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The convolved x (..., H, P) and B, C (..., G, N), as views."""
        states = self.n_groups * self.ssm_state_size
        x, B, C = torch.split(x, [self.intermediate_size, states, states], dim=-1)
        groups = (*x.shape[:-1], self.n_groups, self.ssm_state_size)
        return self._by_head(x), B.view(groups), C.view(groups)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim)

    def _gate_heads(self, gate: torch.Tensor) -> torch.Tensor | None:
        """The gate, where the scan applies it because there is no gated norm after it."""
        if not isinstance(self.norm, nn.Identity):
            return None
        return self._by_head(gate)

    def _finish(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        y = y.flatten(-2)
        if not isinstance(self.norm, nn.Identity):
            y = self.norm(y, gate)
        return self.out_proj(y)

    def scan(
        self,
        hidden: torch.Tensor,
        conv_state: torch.Tensor | None = None,
        ssm_state: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        one_by_one: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H) from the given states: output, and both states after it.

        ``one_by_one`` gives it the bits of steps, wherever it begins and ends.
        """
        A, D, dt_bias, weight, bias = self._constants()
        gate, x, dt = self._split(self.project(hidden))
        x, conv_state = convolve(x.transpose(1, 2), weight, bias, self.activation, conv_state, mask)
        x, B, C = self._heads(x.transpose(1, 2))
        y, ssm_state = ops.ssd(
            x,
            dt,
            A,
            B,
            C,
            1 if one_by_one else 64,
            D=D,
            z=self._gate_heads(gate),
            dt_bias=dt_bias,
            initial_state=ssm_state,
            dt_softplus=True,
            dt_limit=self.dt_limit(),
            mask=mask,
        )[:2]
        return self._finish(y, gate), conv_state, ssm_state

    def step(
        self,
        hidden: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token (B, 1, H); both states move on in place, those in ``slots`` (B,) where given."""
        A, D, dt_bias, weight, bias = self._constants()
        gate, x, dt = self._split(self.project(hidden)[:, 0])
        x = ops.causal_conv1d_update(
            x, conv_state, weight, bias, self.activation, state_indices=slots
        )
        x, B, C = self._heads(x)
        y = ops.ssd_state_update(
            ssm_state,
            x,
            dt,
            A,
            B,
            C,
            D,
            self._gate_heads(gate),
            dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit(),
            state_indices=slots,
        )
        return self._finish(y, gate).unsqueeze(1)
