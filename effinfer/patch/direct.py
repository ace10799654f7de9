"""Decoding one token as bare native calls, on scratch that each thread keeps.

A step through the modules and public ops costs more in Python than small layers cost in arithmetic.
Here everything those check is checked once, and the step is the native calls and nothing else: no
allocation but the output. Where a hook, another backend or a compiler needs the modules, the step
goes through them; the numbers are the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from effinfer import _native
from effinfer.nn import Mamba1Mixer, Mamba2Mixer
from effinfer.patch.linear import LinearWithPacked

T = TypeVar("T")
_threads = threading.local()


def direct_kernels(x: torch.Tensor) -> Any:
    """The native module to call, or None where the ops must be."""
    if (
        torch.compiler.is_compiling()
        or _native.wants_reference()
        or not x.is_cpu
        or type(x) is not torch.Tensor
        or (torch.is_grad_enabled() and x.requires_grad)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return None
    return _native.native(x)


def are_bare(mixer: Any) -> bool:
    """Whether calling each linear of ``mixer`` is its packed multiplication and nothing more."""
    modules = mixer._modules
    for name in mixer.direct_linears:
        own = modules[name].__dict__
        if (
            not isinstance(modules[name], LinearWithPacked)
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
        ):
            return False
        bias = own["_parameters"]["bias"]
        if bias is not None and bias.dtype is not torch.float32:
            return False
    return True


def _scratch(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What ``make`` gives, kept for this thread; layers of the same sizes share it."""
    kept: dict[tuple[Any, ...], T] = _threads.__dict__.setdefault("scratch", {})
    found = kept.get(key)
    if found is None:
        if len(kept) >= 16:  # batch sizes come and go
            kept.clear()
        found = kept[key] = make()
    return found


def _multiply(native: Any, linear: Any, x: torch.Tensor, out: torch.Tensor) -> None:
    bias = linear._parameters["bias"]
    native.linear(x, linear.packed(), linear.out_features, bias, "none", None, out)


class DirectMamba1(Mamba1Mixer):
    """Mamba-1's step as six native calls."""

    direct_linears = ("in_proj", "x_proj", "dt_proj", "out_proj")
    _modules: dict[str, Any]

    def direct_step(
        self, native: Any, hidden: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        """One token (B, H), as ``step``."""
        A, D, weight, bias = self._constants()
        # By dictionary: nn.Module's attribute lookup is slow.
        in_proj, x_proj, dt_proj, out_proj = map(self._modules.__getitem__, self.direct_linears)
        batch, width = hidden.shape[0], A.shape[0]
        rank, states = self.time_step_rank, self.ssm_state_size

        def make() -> tuple[torch.Tensor, ...]:
            xz = hidden.new_empty(batch, 2 * width)
            selected = hidden.new_empty(batch, rank + 2 * states)
            x, dt, y = hidden.new_empty(3, batch, width)
            parts = torch.split(selected, [rank, states, states], dim=1)
            return xz, xz[:, :width], xz[:, width:], x, selected, *parts, dt, y

        key = (1, batch, width, rank, states, hidden.dtype)
        xz, u, z, x, selected, low, B, C, dt, y = _scratch(key, make)
        _multiply(native, in_proj, hidden, xz)
        native.causal_conv1d_update(u, conv_state, weight, bias, True, 1, None, x)
        _multiply(native, x_proj, x, selected)
        low, B, C = self.normalise(low, B, C)
        _multiply(native, dt_proj, low, dt)
        native.selective_state_update(ssm_state, x, dt, A, B, C, D, z, None, True, None, y)
        out = hidden.new_empty(batch, out_proj.out_features)
        _multiply(native, out_proj, y, out)
        return out


class DirectMamba2(Mamba2Mixer):
    """Mamba-2's step as four native calls and its norm."""

    direct_linears = ("in_proj", "out_proj")
    _modules: dict[str, Any]

    def direct_step(
        self, native: Any, hidden: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> torch.Tensor:
        """One token (B, H), as ``step``."""
        A, D, dt_bias, weight, bias = self._constants()
        in_proj, out_proj = map(self._modules.__getitem__, self.direct_linears)
        batch, inner = hidden.shape[0], self.intermediate_size

        def make() -> tuple[torch.Tensor, ...]:
            projected = hidden.new_empty(batch, in_proj.out_features)
            gate, raw, dt = self._split(projected)
            mixed = hidden.new_empty(batch, self.conv_dim)
            return (
                projected,
                gate,
                raw,
                dt,
                mixed,
                *self._heads(mixed),
                hidden.new_empty(batch, inner),
            )

        key = (2, batch, inner, self.conv_dim, self.num_heads, self.n_groups, hidden.dtype)
        projected, gate, raw, dt, mixed, x, B, C, y = _scratch(key, make)
        _multiply(native, in_proj, hidden, projected)
        native.causal_conv1d_update(raw, conv_state, weight, bias, True, 1, None, mixed)
        native.ssd_state_update(
            ssm_state, x, dt, A, B, C, D, self._gate_heads(gate), dt_bias, True,
            *self.dt_limit(), None, self._by_head(y),
        )  # fmt: skip
        if not isinstance(self.norm, nn.Identity):
            y = self.norm(y, gate)
        out = hidden.new_empty(batch, out_proj.out_features)
        _multiply(native, out_proj, y, out)
        return out
