"""The Mamba-2 mixer as direct native calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effinfer.nn import Mamba2Mixer
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


class DirectMamba2(Mamba2Mixer):
    """Mamba-2's step and scan as four native calls and its norm; with a norm before it, the residual
    block around it as one more: ``hidden + mixer(norm(hidden))``."""

    direct_linears = ("in_proj", "out_proj")
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
        native, (in_proj, out_proj), (A, D, dt_bias, weight, bias) = direct
        batch, _, features = hidden.shape
        inner = self.intermediate_size

        def make() -> tuple[torch.Tensor, ...]:
            projected = hidden.new_empty(batch, in_proj[1])
            mixed, y = hidden.new_empty(batch, self.conv_dim), hidden.new_empty(batch, inner)
            entry = hidden.new_empty(hidden.shape)
            return entry, projected, *self._split(projected), mixed, *self._heads(mixed), y

        key = (
            2,
            batch,
            features,
            inner,
            self.conv_dim,
            self.num_heads,
            self.n_groups,
            hidden.dtype,
        )
        entry, projected, gate, raw, dt, mixed, x, B, C, y = scratch(key, make)
        multiply(native, in_proj, normed(native, norm, hidden, entry), projected)
        native.causal_conv1d_update(raw, conv_state, weight, bias, True, 1, slots, mixed)
        native.ssd_state_update(
            ssm_state, x, dt, A, B, C, D, self._gate_heads(gate), dt_bias, True,
            *self.dt_limit(), slots, self._by_head(y),
        )  # fmt: skip
        if not isinstance(self.norm, nn.Identity):
            y = self.norm(y, gate)
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
        one_by_one: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H), as ``scan`` without a mask; the output may be that of the
        ``last`` tokens only, whatever the gate is elsewhere."""
        native, (in_proj, out_proj), (A, D, dt_bias, weight, bias) = direct
        inner, past = self.intermediate_size, weight.shape[1] - 1
        widths = (hidden.shape[2], in_proj[1], self.conv_dim, inner)
        buffers = block_scratch(native, hidden, *widths)

        def run(
            hidden: torch.Tensor,
            out: torch.Tensor,
            conv_state: torch.Tensor | None,
            ssm_state: torch.Tensor | None,
        ) -> States:
            batch, length, _ = hidden.shape
            entry, projected, mixed, y = (
                b[: batch * length].view(batch, length, -1) for b in buffers
            )
            conv_final = A.new_empty(batch, self.conv_dim, past)
            ssm_final = A.new_empty(batch, self.num_heads, self.head_dim, self.ssm_state_size)
            gate, raw, dt = self._split(projected)
            given = out.shape[1]
            source = normed(native, norm, hidden, entry)
            if given == length:
                multiply(native, in_proj, source, projected)
            else:
                gate_proj, others = parted(in_proj, inner)
                multiply(native, others, source, projected[..., inner:])
                multiply_last(native, gate_proj, source, gate, given)
            native.causal_conv1d(
                raw.mT, weight, bias, True, conv_state, 1, None, None, 1, mixed.mT, conv_final
            )
            x, B, C = self._heads(mixed)
            native.ssd(
                x, dt, A, B, C, D, self._gate_heads(gate), dt_bias, ssm_state, None, None, None,
                True, *self.dt_limit(), one_by_one, self._by_head(y), ssm_final, None,
            )  # fmt: skip
            y = last_rows(y, given)
            if not isinstance(self.norm, nn.Identity):
                y = self.norm(y, last_rows(gate, given))
            residual = None if norm is None else last_rows(hidden, given)
            multiply(native, out_proj, y, out.view(-1, out_proj[1]), residual)
            return conv_final, ssm_final

        out = output_of(hidden, in_proj, inner, out_proj, last)
        return out, *in_blocks(native, run, hidden, out, conv_state, ssm_state)
