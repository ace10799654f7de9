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
from torch.nn.modules.module import _has_any_global_hook

from effinfer import _native
from effinfer.nn.stamp import derived
from effinfer.patch.linear import LinearWithPacked

T = TypeVar("T")
States = tuple[torch.Tensor, torch.Tensor]
Product = tuple[torch.Tensor, int, torch.Tensor | None]  # packed weight, outputs, bias
Prepared = tuple[list[Product], Any]  # and the mixer's constants
Direct = tuple[Any, list[Product], Any]  # the native module, and what is prepared
_threads = threading.local()
# `ops.ssd` counts its chunks from the first token of a call: cut between two of them, a run has the
# bits of one call.
_CHUNK = 48
BLOCK = 8 * _CHUNK  # tokens; more lets activations out of cache, fewer read the weights too often


def direct_calls(mixer: Any, x: torch.Tensor) -> Direct | None:
    """What direct calls on ``x`` need, or None where it takes the modules or the ops."""
    if (
        torch.compiler.is_compiling()
        or x.numel() == 0
        or _native.wants_reference()
        or not x.is_cpu
        or type(x) is not torch.Tensor
        or (torch.is_grad_enabled() and x.requires_grad)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return None
    ready = _prepared(mixer)
    return None if ready is None else (_native.native(x), *ready)


def is_bare(module: Any) -> bool:
    """Whether calling ``module`` is its class's forward and nothing more."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _prepared(mixer: Any) -> Prepared | None:
    """The linears of ``mixer`` as ``multiply`` takes them and its constants, or None where a module
    inside is more than its forward: a hook may keep what it sees, which must not be scratch.

    Kept until a weight changes; one look at all of them costs less than each linear's own.
    """
    # By dictionary: nn.Module's attribute lookup is slow.
    modules = mixer._modules
    if not all(map(is_bare, modules.values())):
        return None
    weights = [*mixer._parameters.values(), *modules["conv1d"]._parameters.values()]
    for name in mixer.direct_linears:
        linear = modules[name]
        if not isinstance(linear, LinearWithPacked):
            return None
        weights += linear.__dict__["_parameters"].values()

    def build() -> Prepared:
        products = [_product(modules[name]) for name in mixer.direct_linears]
        return products, mixer._constants()

    return derived(mixer, weights, build, "_effinfer_direct")


def _product(linear: Any) -> Product:
    bias = linear.bias
    return linear.packed(), linear.out_features, None if bias is None else bias.detach().float()


def multiply(
    native: Any,
    product: Product,
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """Into ``out``: the product's linear of ``x``, and ``residual``."""
    packed, out_features, bias = product
    native.linear(x, packed, out_features, bias, "none", residual, out)


def normed(native: Any, norm: Any, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``norm(hidden)`` in ``out``, or ``hidden`` as it is without a norm."""
    if norm is None:
        return hidden
    weight = norm._parameters["weight"]
    native.rms_norm(hidden, weight, norm.variance_epsilon, None, False, out, None)
    return out


def scratch(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What ``make`` gives, kept for this thread; layers of the same sizes share it."""
    kept: dict[tuple[Any, ...], T] = _threads.__dict__.setdefault("scratch", {})
    found = kept.get(key)
    if found is None:
        if len(kept) >= 16:  # batch sizes come and go
            kept.clear()
        found = kept[key] = make()
    return found


def block_scratch(hidden: torch.Tensor, *widths: int) -> list[torch.Tensor]:
    """A buffer (BLOCK, width) of ``hidden``'s type for each width."""
    key = ("block", *widths, hidden.dtype)
    return scratch(key, lambda: [hidden.new_empty(BLOCK, width) for width in widths])


def in_blocks(
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
    together = max(1, BLOCK // length)
    pieces = -(-length // BLOCK)
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
