"""The SSM mixers of the patched families: Hugging Face's calling convention over ``effinfer.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effinfer.errors import UnsupportedOpError
from effinfer.ops._register import dense_float32
from effinfer.patch.cache import read_states, write_states
from effinfer.patch.direct import DirectMamba1, DirectMamba2, are_bare, direct_kernels
from effinfer.patch.swap import Patched


def _local_mask(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask of these ``length`` tokens as booleans; None where every token is real."""
    if mask is None:
        return None
    mask = mask[:, -length:].bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


class CachedMixer(Patched):
    """Runs ``scan`` or ``step`` on the states Hugging Face's cache holds for this layer.

    A run of any length continues from the cached states, and tokens that the mask leaves out touch
    neither state: what comes out does not depend on how a sequence was split or padded.
    """

    layer_idx: int
    direct = True

    if TYPE_CHECKING:
        scan: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
        step: Callable[..., torch.Tensor]
        direct_step: Callable[..., torch.Tensor]
        direct_scan: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Mix along time; ``attention_mask`` is 1 or True for real tokens."""
        if kwargs.get("seq_idx") is not None:
            raise UnsupportedOpError("patched mixers do not take seq_idx (packed sequences)")
        mask = _local_mask(attention_mask, hidden_states.shape[1])
        states = None if cache_params is None else read_states(cache_params, self.layer_idx)
        if states is not None and mask is None and hidden_states.shape[1] == 1:
            return self._step(hidden_states, *states)
        conv_state, ssm_state = (None, None) if states is None else states
        if conv_state is not None:
            conv_state = conv_state[..., 1:]
        output, conv_state, ssm_state = self._scan(hidden_states, conv_state, ssm_state, mask)
        if cache_params is not None:
            write_states(cache_params, self.layer_idx, conv_state, ssm_state)
        return output

    def _scan(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor | None,
        ssm_state: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        native = self._direct(hidden_states)
        if native is None or mask is not None or hidden_states.numel() == 0:
            return self.scan(hidden_states, conv_state, ssm_state, mask)
        return self.direct_scan(
            native, hidden_states, dense_float32(conv_state), dense_float32(ssm_state)
        )

    def _direct(self, hidden_states: torch.Tensor) -> Any:
        """The native module, where nothing needs the modules; else None."""
        native = direct_kernels(hidden_states) if self.direct else None
        return native if native is not None and are_bare(self) else None

    def _step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        # A cache that the stock model began is in the model's own type, the ops keep float32.
        wide = ssm_state.float()
        native = self._direct(hidden_states)
        if native is not None:
            output = self.direct_step(native, hidden_states[:, 0], conv_state, wide).unsqueeze(1)
        else:
            output = self.step(hidden_states, conv_state, wide)
        if wide is not ssm_state:
            ssm_state.copy_(wide)
        return output


class MambaMixer(CachedMixer, DirectMamba1):
    """mamba."""


class NormedMambaMixer(CachedMixer, DirectMamba1):
    """falcon_mamba, jamba: dt, B and C each have their own norm."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def normalise(
        self, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three norms."""
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


class SSDMixer(CachedMixer, DirectMamba2):
    """mamba2, bamba, granitemoehybrid, nemotron_h, zamba2."""


class FalconH1Mixer(CachedMixer, DirectMamba2):
    """falcon_h1: fixed multipliers around the input projection."""

    direct = False
    ssm_in_multiplier: float
    mup_vector: torch.Tensor

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The projection between its multipliers."""
        projected = self.in_proj(hidden * self.ssm_in_multiplier) * self.mup_vector
        return projected.to(hidden.dtype)


def mixer_reasons(module: nn.Module) -> list[str]:
    """Why this mixer cannot run on effinfer's ops."""
    reasons = []
    if module.activation not in ("silu", "swish"):
        reasons.append(f"activation is {module.activation!r}; the convolution has silu")
    if module.A_log.dtype == torch.float64:
        reasons.append("parameters are float64; the ops compute in float32")
    return reasons
