"""Mixers as bare native calls, on scratch that each thread keeps.

A step through the modules and public ops costs more in Python than small layers cost in arithmetic,
and a long run of tokens costs more in fresh memory than in its convolution. Here everything those
check is checked once, and what is left is the native calls: no allocation but output and states. A
run is taken in blocks of tokens, whose activations then stay in cache, and whose memory does not
grow with the prompt. Where a hook, another backend or a compiler needs the modules, the mixer goes
through them; the numbers are the same to the bit.
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
States = tuple[torch.Tensor, torch.Tensor]
_threads = threading.local()
# `ops.ssd` counts its chunks from the first token of a call: cut between two of them, a run has the
# bits of one call.
_CHUNK = 48
_BLOCK = 8 * _CHUNK  # tokens; more lets activations out of cache, fewer read the weights too often


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


def _in_blocks(
    run: Callable[..., States],
    hidden: torch.Tensor,
    out: torch.Tensor,
    conv_state: torch.Tensor | None,
    ssm_state: torch.Tensor | None,
) -> States:
    """``run(hidden, out, conv_state, ssm_state)`` on all (B, L, H) tokens, at most a block at a time.

    A block is many short rows or a piece of a long one; a row's states go from piece to piece.
    """
    batch, length, _ = hidden.shape
    together = max(1, _BLOCK // length)
    pieces = -(-length // _BLOCK)
    piece = -(-length // (pieces * _CHUNK)) * _CHUNK  # all about the same
    finals: list[States] = []
    for first in range(0, batch, together):
        rows = slice(first, first + together)
        states: Any = [None if s is None else s[rows] for s in (conv_state, ssm_state)]
        for start in range(0, length, piece):
            block = rows, slice(start, start + piece)
            states = run(hidden[block], out[block], *states)
        finals.append(states)
    if len(finals) == 1:
        return finals[0]
    conv_states, ssm_states = zip(*finals, strict=True)
    return torch.cat(conv_states), torch.cat(ssm_states)


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

    def direct_scan(
        self,
        native: Any,
        hidden: torch.Tensor,
        conv_state: torch.Tensor | None,
        ssm_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H), as ``scan`` without a mask."""
        A, D, weight, bias = self._constants()
        in_proj, x_proj, dt_proj, out_proj = map(self._modules.__getitem__, self.direct_linears)
        width, past = weight.shape[0], weight.shape[1] - 1
        rank, states = self.time_step_rank, self.ssm_state_size
        widths = (2 * width, width, rank + 2 * states, width, width)

        def make() -> list[torch.Tensor]:
            return [hidden.new_empty(_BLOCK, wide) for wide in widths]

        buffers = _scratch((10, *widths, hidden.dtype), make)

        def run(
            hidden: torch.Tensor,
            out: torch.Tensor,
            conv_state: torch.Tensor | None,
            ssm_state: torch.Tensor | None,
        ) -> States:
            batch, length, _ = hidden.shape
            xz, x, selected, dt, y = (
                b[: batch * length].view(batch, length, -1).transpose(1, 2) for b in buffers
            )
            conv_final = A.new_empty(batch, width, past)
            ssm_final, snapshots = A.new_empty(batch, *A.shape), A.new_empty(batch, 0, *A.shape)
            _multiply(native, in_proj, hidden, xz.mT)
            u, z = xz.chunk(2, dim=1)
            native.causal_conv1d(u, weight, bias, True, conv_state, 1, None, None, 1, x, conv_final)
            _multiply(native, x_proj, x.mT, selected.mT)
            low, B, C = torch.split(selected.mT, [rank, states, states], dim=2)
            low, B, C = self.normalise(low, B, C)
            _multiply(native, dt_proj, low, dt.mT)
            native.selective_scan(
                x, dt, A, B.mT, C.mT, D, z, None, True, ssm_state, None, None,
                False, y, ssm_final, snapshots,
            )  # fmt: skip
            _multiply(native, out_proj, y.mT, out)
            return conv_final, ssm_final

        out = hidden.new_empty(*hidden.shape[:2], out_proj.out_features)
        return out, *_in_blocks(run, hidden, out, conv_state, ssm_state)


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

    def direct_scan(
        self,
        native: Any,
        hidden: torch.Tensor,
        conv_state: torch.Tensor | None,
        ssm_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A run of tokens (B, L, H), as ``scan`` without a mask."""
        A, D, dt_bias, weight, bias = self._constants()
        in_proj, out_proj = map(self._modules.__getitem__, self.direct_linears)
        past = weight.shape[1] - 1
        widths = (in_proj.out_features, self.conv_dim, self.intermediate_size)

        def make() -> list[torch.Tensor]:
            return [hidden.new_empty(_BLOCK, wide) for wide in widths]

        buffers = _scratch((20, *widths, hidden.dtype), make)

        def run(
            hidden: torch.Tensor,
            out: torch.Tensor,
            conv_state: torch.Tensor | None,
            ssm_state: torch.Tensor | None,
        ) -> States:
            batch, length, _ = hidden.shape
            projected, mixed, y = (b[: batch * length].view(batch, length, -1) for b in buffers)
            conv_final = A.new_empty(batch, self.conv_dim, past)
            ssm_final = A.new_empty(batch, self.num_heads, self.head_dim, self.ssm_state_size)
            _multiply(native, in_proj, hidden, projected)
            gate, raw, dt = self._split(projected)
            native.causal_conv1d(
                raw.mT, weight, bias, True, conv_state, 1, None, None, 1, mixed.mT, conv_final
            )
            x, B, C = self._heads(mixed)
            native.ssd(
                x, dt, A, B, C, D, self._gate_heads(gate), dt_bias, ssm_state, None, None, None,
                True, *self.dt_limit(), self._by_head(y), ssm_final, None,
            )  # fmt: skip
            if not isinstance(self.norm, nn.Identity):
                y = self.norm(y, gate)
            _multiply(native, out_proj, y, out)
            return conv_final, ssm_final

        out = hidden.new_empty(*hidden.shape[:2], out_proj.out_features)
        return out, *_in_blocks(run, hidden, out, conv_state, ssm_state)
