"""The Mamba-1 mixer as direct native calls."""

from __future__ import annotations

from typing import Any

import torch

from effinfer.nn import Mamba1Mixer
from effinfer.patch.direct import (
    Direct,
    States,
    block_scratch,
    in_blocks,
    last_rows,
    multiply,
    multiply_last,
    normed,
    output_of,
    parted,
    scratch,
)


class DirectMamba1(Mamba1Mixer):
    """Mamba-1's step and scan as six native calls; with a norm, the residual block around it as one
    more: ``hidden + mixer(norm(hidden))``."""

    direct_linears = ("in_proj", "x_proj", "dt_proj", "out_proj")
    _modules: dict[str, Any]

    def direct_step(
        self,
        direct: Direct,
        hidden: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        norm: Any = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token (B, 1, H), as ``step``."""
        native, (in_proj, x_proj, dt_proj, out_proj), (A, D, weight, bias) = direct
        batch, _, features = hidden.shape
        width, states = A.shape
        rank = self.time_step_rank

        def make() -> tuple[torch.Tensor, ...]:
            xz = hidden.new_empty(batch, 2 * width)
            selected = hidden.new_empty(batch, rank + 2 * states)
            x, dt, y = hidden.new_empty(3, batch, width)
            parts = torch.split(selected, [rank, states, states], dim=1)
            entry = hidden.new_empty(hidden.shape)
            return entry, xz, xz[:, :width], xz[:, width:], x, selected, *parts, dt, y

        key = (1, batch, features, width, rank, states, hidden.dtype)
        entry, xz, u, z, x, selected, low, B, C, dt, y = scratch(key, make)
        multiply(native, in_proj, normed(native, norm, hidden, entry), xz)
        native.causal_conv1d_update(u, conv_state, weight, bias, True, 1, slots, x)
        multiply(native, x_proj, x, selected)
        low, B, C = self.normalise(low, B, C)
        multiply(native, dt_proj, low, dt)
        native.selective_state_update(ssm_state, x, dt, A, B, C, D, z, None, True, slots, y)
        out = hidden.new_empty(batch, 1, out_proj[1])
        multiply(native, out_proj, y, out, None if norm is None else hidden)
        return out

    def direct_scan(
        self,
        direct: Direct,
        hidden: torch.Tensor,
        conv_state: torch.Tensor | None,
        ssm_state: torch.Tensor | None,
        norm: Any = None,
        last: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H), as ``scan`` without a mask; the output may be that of the
        ``last`` tokens only, whatever the gate is elsewhere."""
        native, (in_proj, x_proj, dt_proj, out_proj), (A, D, weight, bias) = direct
        width, states = A.shape
        rank, past = self.time_step_rank, weight.shape[1] - 1
        widths = (hidden.shape[2], 2 * width, width, rank + 2 * states, width, width)
        buffers = block_scratch(native, hidden, *widths)

        def run(
            hidden: torch.Tensor,
            out: torch.Tensor,
            conv_state: torch.Tensor | None,
            ssm_state: torch.Tensor | None,
        ) -> States:
            batch, length, _ = hidden.shape
            # As the scan wants them: (B, D, L), channel stride 1.
            entry, xz, x, selected, dt, y = (
                b[: batch * length].view(batch, length, -1).mT for b in buffers
            )
            conv_final = A.new_empty(batch, width, past)
            ssm_final, snapshots = A.new_empty(batch, *A.shape), A.new_empty(batch, 0, *A.shape)
            u, z = xz.chunk(2, dim=1)
            given = out.shape[1]
            source = normed(native, norm, hidden, entry.mT)
            if given == length:
                multiply(native, in_proj, source, xz.mT)
            else:
                u_proj, z_proj = parted(in_proj, width)
                multiply(native, u_proj, source, u.mT)
                multiply_last(native, z_proj, source, z.mT, given)
            native.causal_conv1d(u, weight, bias, True, conv_state, 1, None, None, 1, x, conv_final)
            multiply(native, x_proj, x.mT, selected.mT)
            low, B, C = torch.split(selected.mT, [rank, states, states], dim=2)
            low, B, C = self.normalise(low, B, C)
            multiply(native, dt_proj, low, dt.mT)
            native.selective_scan(
                x, dt, A, B.mT, C.mT, D, z, None, True, ssm_state, None, None,
                False, y, ssm_final, snapshots,
            )  # fmt: skip
            residual = None if norm is None else last_rows(hidden, given)
            multiply(native, out_proj, last_rows(y.mT, given), out.view(-1, out_proj[1]), residual)
            return conv_final, ssm_final

        out = output_of(hidden, in_proj, width, out_proj, last)
        return out, *in_blocks(native, run, hidden, out, conv_state, ssm_state)
