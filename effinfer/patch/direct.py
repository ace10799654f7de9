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
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import _has_any_global_hook

from effinfer import _native
from effinfer.nn.lowbit import LowBitLinear
from effinfer.nn.stamp import derived
from effinfer.ops.linear import PANEL
from effinfer.ops.lowbit_linear import PackedLowBit
from effinfer.patch.linear import LinearWithPacked
from effinfer.patch.lowbit import LinearWithLowBit

T = TypeVar("T")
States = tuple[torch.Tensor, torch.Tensor]
# Packed weight, outputs, bias, and whether the input is quantized (which float weights never ask).
Product = tuple[torch.Tensor | PackedLowBit, int, torch.Tensor | None, bool]
Prepared = tuple[list[Product], Any]  # and the mixer's constants
Direct = tuple[Any, list[Product], Any]  # the native module, and what is prepared
_threads = threading.local()
_BLOCK_CHUNKS = 8  # more lets activations out of cache, fewer read the weights too often


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
        if isinstance(linear, LowBitLinear):
            weights += linear._buffers.values()
        elif isinstance(linear, (LinearWithPacked, LinearWithLowBit)):
            weights += linear.__dict__["_parameters"].values()
        else:
            return None

    def build() -> Prepared | None:
        products = [_product(modules[name]) for name in mixer.direct_linears]
        if None in products:
            return None
        return products, mixer._constants()  # type: ignore[return-value]

    return derived(mixer, weights, build, "_effinfer_direct")


def _product(linear: Any) -> Product | None:
    """None where the linear permutes its input, which takes a call of its own."""
    bias = None if linear.bias is None else linear.bias.detach().float()
    if isinstance(linear, LinearWithPacked):
        return linear.packed(), linear.out_features, bias, False
    weight = linear.packed_weight()
    if weight.order is not None:
        return None
    return weight, weight.out_features, bias, linear.activations == "int8"


def multiply(
    native: Any,
    product: Product,
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """Into ``out``: the product's linear of ``x``, and ``residual``."""
    weight, out_features, bias, int8 = product
    if type(weight) is not PackedLowBit:
        native.linear(x, weight, out_features, bias, "none", residual, out)
        return
    native.lowbit_linear(
        x, weight.packed, weight.scale, weight.zero, weight.offset, bias, residual, None, None,
        weight.format, out_features, weight.in_features, weight.group_size, int8, "none", 0, 0, out,
    )  # fmt: skip


def parted(product: Product, at: int) -> tuple[Product, Product]:
    """The product's first ``at`` outputs, whole panels of them, and the others."""
    weight, out_features, bias, int8 = product
    panel = at // PANEL
    first, others = (None, None) if bias is None else (bias[:at], bias[at:])
    left: torch.Tensor | PackedLowBit
    right: torch.Tensor | PackedLowBit
    if isinstance(weight, PackedLowBit):
        left, right = weight.prefix(at), _without_panels(weight, panel)
    else:
        left, right = weight[:panel], weight[panel:]
    return (left, at, first, int8), (right, out_features - at, others, int8)


def _without_panels(weight: PackedLowBit, count: int) -> PackedLowBit:
    zero, offset = (None if t is None else t[count:] for t in (weight.zero, weight.offset))
    return replace(
        weight,
        out_features=weight.out_features - count * PANEL,
        packed=weight.packed[count:],
        scale=weight.scale[count:],
        zero=zero,
        offset=offset,
    )


def output_of(
    hidden: torch.Tensor, in_proj: Product, gate: int, out_proj: Product, last: int | None
) -> torch.Tensor:
    """Room for the output of the ``last`` tokens of ``hidden`` (B, L, H), or of all.

    The others' gates are left out of ``in_proj``, where ``gate`` outputs of it are whole panels.
    """
    batch, length, _ = hidden.shape
    if last is None or last > length or gate % PANEL:
        last = length
    return hidden.new_empty(batch, last, out_proj[1])


def last_rows(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last ``tokens`` of every row of (B, L, D), as (B * tokens, D)."""
    return x[:, x.shape[1] - tokens :].flatten(0, 1)


def multiply_last(
    native: Any, product: Product, x: torch.Tensor, out: torch.Tensor, tokens: int
) -> None:
    """``multiply`` for the last ``tokens`` of every row; the others' ``out`` stays as it is."""
    given = x.new_empty(x.shape[0], tokens, product[1])
    multiply(native, product, last_rows(x, tokens), given.flatten(0, 1))
    out[:, out.shape[1] - tokens :] = given


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
        # Of inference mode, a later call outside it could not write into them.
        with torch.inference_mode(False), torch.no_grad():
            found = kept[key] = make()
    return found


def block_scratch(native: Any, hidden: torch.Tensor, *widths: int) -> list[torch.Tensor]:
    """A buffer (tokens of a block, width) of ``hidden``'s type for each width."""
    key = ("block", *widths, hidden.dtype)
    tokens = _BLOCK_CHUNKS * native.ssd_chunk
    return scratch(key, lambda: [hidden.new_empty(tokens, width) for width in widths])


def in_blocks(
    native: Any,
    run: Callable[..., States],
    hidden: torch.Tensor,
    out: torch.Tensor,
    conv_state: torch.Tensor | None,
    ssm_state: torch.Tensor | None,
) -> States:
    """``run(hidden, out, conv_state, ssm_state)`` on all (B, L, H) tokens, at most a block at a time.

    A block is many short rows or a piece of a long one; a row's states go from piece to piece.
    ``out`` may be that of the last tokens only; a block's has as many of them as lie in it.
    """
    batch, length, _ = hidden.shape
    # `ops.ssd` counts its chunks from the first token of a call: cut between two of them, a run has
    # the bits of one call.
    chunk = native.ssd_chunk
    most = _BLOCK_CHUNKS * chunk
    together = max(1, most // length)
    pieces = -(-length // most)
    piece = -(-length // (pieces * chunk)) * chunk  # all about the same
    unread = length - out.shape[1]
    finals: list[States] = []
    for first in range(0, batch, together):
        rows = slice(first, first + together)
        states: Any = [None if s is None else s[rows] for s in (conv_state, ssm_state)]
        for start in range(0, length, piece):
            end = start + piece
            given = out[rows, max(0, start - unread) : max(0, end - unread)]
            states = run(hidden[rows, start:end], given, *states)
        finals.append(states)
    if len(finals) == 1:
        return finals[0]
    conv_states, ssm_states = zip(*finals, strict=True)
    return torch.cat(conv_states), torch.cat(ssm_states)
