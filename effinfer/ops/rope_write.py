"""Rotary embedding of a fused projection (RoPE, arXiv 2104.09864), and its k and v into pages."""

from __future__ import annotations

import torch

from effinfer._native import native
from effinfer.ops._register import Op, inference_only, public


def _turned(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each element's partner, negative for the first of a pair."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _reference(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor | None,
    plane: torch.Tensor | None,
    q_heads: int,
    kv_heads: int,
    interleaved: bool,
) -> None:
    if k_pages.dim() == 4:
        k_pages, v_pages = k_pages[None], v_pages[None]
    rows, heads, dim = qkv.shape[0], q_heads + kv_heads, k_pages.shape[-1]
    qk = qkv[:, : heads * dim].view(rows, heads, dim)
    v = qkv[:, heads * dim :].view(rows, kv_heads, v_pages.shape[-1])
    if cos is not None and sin is not None:
        line = torch.arange(rows, device=qkv.device) if position is None else position.long()
        some = line >= 0
        wide = torch.promote_types(qkv.dtype, torch.float32)
        x = qk[some, :, : cos.shape[1]].to(wide)
        c, s = (t[line[some]].to(wide)[:, None] for t in (cos, sin))
        qk[some, :, : cos.shape[1]] = (x * c + _turned(x, interleaved) * s).to(qkv.dtype)
    some = slot >= 0
    at = slot[some].long()
    block, offset = at // k_pages.shape[2], at % k_pages.shape[2]
    to = torch.zeros_like(at) if plane is None else plane[some].long()
    k_pages[to, block, offset] = qk[some, q_heads:].to(k_pages.dtype)
    v_pages[to, block, offset] = v[some].to(v_pages.dtype)


def _fake() -> None:
    return None


def _run(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor | None,
    plane: torch.Tensor | None,
    q_heads: int,
    kv_heads: int,
    interleaved: bool,
) -> None:
    inference_only("rope_write", qkv, cos, sin, k_pages, v_pages)
    native(qkv).rope_write(
        qkv, cos, sin, k_pages, v_pages, slot, position, plane, q_heads, kv_heads, interleaved
    )


_OP = Op(
    "rope_write",
    "(Tensor(a!) qkv, Tensor? cos, Tensor? sin, Tensor(b!) k_pages, Tensor(c!) v_pages,"
    " Tensor slot, Tensor? position, Tensor? plane, int q_heads, int kv_heads, bool interleaved)"
    " -> ()",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot: torch.Tensor,
    *,
    q_heads: int,
    kv_heads: int,
    position: torch.Tensor | None = None,
    plane: torch.Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Rotate q and k of a fused projection in place, and put k and v into their pages.

    What comes before ``paged_attention`` in an attention layer: afterwards
    ``qkv[:, : q_heads * head_dim].unflatten(1, (q_heads, head_dim))`` is its ``q``.

    Args:
        qkv: ``(rows, (q_heads + kv_heads) * head_dim + kv_heads * v_head_dim)``, float32, bfloat16 or
            float16: q, k, v side by side; rows any stride apart. Changed in place.
        cos, sin: float32 ``(rows, rotary_dim)`` as transformers' rotary embeddings give them (any
            attention scaling in them), rotary_dim <= head_dim, even; elements past it stay. With
            ``position`` they are tables ``(positions, rotary_dim)``, computed once for a model. Both
            None: nothing is rotated (models without positions).
        k_pages, v_pages: as for ``paged_attention``, in either layout; changed in place.
        slot: int32 ``(rows,)``, where a row's k and v go: ``block * block_size + offset``; negative
            for nowhere. No slot of a plane twice.
        q_heads, kv_heads: numbers of heads.
        position: int32 ``(rows,)``, the line of cos and sin for each row; negative: no rotation.
        plane: int32 ``(rows,)``, the plane each row writes to, by default 0.
        interleaved: pairs are neighbours (GPT-J, Cohere), not halves (Llama). cos and sin have an
            entry per element either way.

    Products and sums are float32, each rounded: float32 results are bit-identical to transformers'.
    Lower dtypes are rounded once, at the end.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; a slot, position or plane
            out of range; a slot named twice. Nothing is changed then.
        RuntimeError: an input requires grad.
    """
    _OP(qkv, cos, sin, k_pages, v_pages, slot, position, plane, q_heads, kv_heads, interleaved)
