"""The SSM mixers of the patched families: Hugging Face's calling convention over ``effinfer.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effinfer.errors import UnsupportedOpError
from effinfer.ops._register import dense_float32
from effinfer.patch.cache import read_states, write_states
from effinfer.patch.direct import Direct, direct_calls, is_bare
from effinfer.patch.direct_mamba1 import DirectMamba1
from effinfer.patch.direct_mamba2 import DirectMamba2
from effinfer.patch.last_tokens import tokens_read
from effinfer.patch.norms import RMSNorm
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
        direct = self.direct_calls(hidden_states) if mask is None else None
        return self.mix(hidden_states, cache_params, mask, direct)

    def direct_calls(self, hidden_states: torch.Tensor) -> Direct | None:
        """What direct calls need, or None where the modules are needed."""
        return direct_calls(self, hidden_states) if self.direct else None

    def mix(
        self,
        hidden_states: torch.Tensor,
        cache: Any,
        mask: torch.Tensor | None,
        direct: Direct | None,
        norm: RMSNorm | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """The output, and the states moved on in the cache.

        With ``direct``, by direct calls; then ``norm`` may be the one before the mixer, and the
        output is that of the residual block around both; of a run of tokens, it may be that of the
        ``last`` ones.
        """
        if (mix := getattr(cache, "mix", None)) is not None:  # an engine's, over slots of sequences
            output: torch.Tensor = mix(self, hidden_states, direct, norm)
            return output
        states = None if cache is None else read_states(cache, self.layer_idx)
        if direct is not None:
            hidden_states = hidden_states.contiguous()
        if states is not None and mask is None and hidden_states.shape[1] == 1:
            conv_state, ssm_state = states
            # A cache that the stock model began is in the model's own type, the ops keep float32.
            wide = ssm_state.float()
            if direct is None:
                output = self.step(hidden_states, conv_state, wide)
            else:
                output = self.direct_step(direct, hidden_states, conv_state, wide, norm)
            if wide is not ssm_state:
                ssm_state.copy_(wide)
            return output
        conv, ssm = (None, None) if states is None else states
        conv, ssm = dense_float32(None if conv is None else conv[..., 1:]), dense_float32(ssm)
        if direct is None:
            output, *after = self.scan(hidden_states, conv, ssm, mask)
        else:
            output, *after = self.direct_scan(direct, hidden_states, conv, ssm, norm, last)
        if cache is not None:
            write_states(cache, self.layer_idx, *after)
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


class ResidualBlock(Patched):
    """The blocks of mamba, falcon_mamba and mamba2: ``hidden + mixer(norm(hidden))``."""

    _modules: dict[str, Any]

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As one run of direct calls where nothing needs the modules; else the stock forward."""
        mixer, norm = self._modules["mixer"], self._modules["norm"]
        if (
            isinstance(mixer, CachedMixer)
            and isinstance(norm, RMSNorm)
            and hidden_states.dtype is torch.float32 is norm.__dict__["_parameters"]["weight"].dtype
            and not kwargs
            and is_bare(mixer)
            and is_bare(norm)
            and (direct := mixer.direct_calls(hidden_states)) is not None
            and _local_mask(attention_mask, hidden_states.shape[1]) is None
        ):
            return mixer.mix(hidden_states, cache_params, None, direct, norm, tokens_read(self))
        stock: Any = super()
        output: torch.Tensor = stock.forward(
            hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
        return output


def mixer_reasons(module: nn.Module) -> list[str]:
    """Why this mixer cannot run on effinfer's ops."""
    reasons = []
    if module.activation not in ("silu", "swish"):
        reasons.append(f"activation is {module.activation!r}; the convolution has silu")
    if module.A_log.dtype == torch.float64:
        reasons.append("parameters are float64; the ops compute in float32")
    return reasons


def block_reasons(module: nn.Module) -> list[str]:
    """Why this block gains nothing: its mixer cannot be patched."""
    mixer: Any = module.mixer
    return [f"mixer: {reason}" for reason in mixer_reasons(mixer)]


def model_reasons(module: nn.Module) -> list[str]:
    """Why this causal LM gains nothing: its last block cannot be patched."""
    backbone: Any = module.backbone
    return [f"last block: {reason}" for reason in block_reasons(backbone.layers[-1])]
