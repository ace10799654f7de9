"""Copying recurrent states between slots: gather, scatter, fork, rollback. All bit-exact."""

from __future__ import annotations

import torch

from effinfer._native import native
from effinfer.ops._register import Op, public


def _reference(
    dst: torch.Tensor, dst_indices: torch.Tensor, src: torch.Tensor, src_indices: torch.Tensor
) -> None:
    both = (dst_indices >= 0) & (src_indices >= 0)
    dst[dst_indices[both].long()] = src[src_indices[both].long()]


def _fake() -> None:
    return None


def _run(
    dst: torch.Tensor, dst_indices: torch.Tensor, src: torch.Tensor, src_indices: torch.Tensor
) -> None:
    native(dst).state_copy(dst, dst_indices, src, src_indices)


_OP = Op(
    "state_copy",
    "(Tensor(a!) dst, Tensor dst_indices, Tensor src, Tensor src_indices) -> ()",
    run=_run,
    fake=_fake,
    reference=_reference,
)


@public(_OP)
def state_copy(
    dst: torch.Tensor, dst_indices: torch.Tensor, src: torch.Tensor, src_indices: torch.Tensor
) -> None:
    """Copy ``src[src_indices[i]]`` to ``dst[dst_indices[i]]`` for every i, in place, bit for bit.

    Args:
        dst: ``(S, ...)``, a pool of states, any dtype and strides.
        dst_indices: int32 ``(n,)``, each -1 (skip this copy) or a slot of ``dst``, none twice.
        src: ``(S', ...)`` of the same dtype and state shape; it may be ``dst`` itself if no slot is
            both read and written (``state_fork`` has no such limit).
        src_indices: int32 ``(n,)``, each -1 (skip) or a slot of ``src``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index that does not fit; a destination named
            twice; overlapping memory. ``dst`` is unchanged then.
    """
    _OP(dst, dst_indices, src, src_indices)


def _all_slots(states: torch.Tensor) -> torch.Tensor:
    return torch.arange(states.shape[0], dtype=torch.int32, device=states.device)


def state_gather(pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A new tensor ``(n, ...)`` of the pool's states at ``indices``, zeros where an index is -1."""
    states = pool.new_zeros((indices.shape[0], *pool.shape[1:]))
    state_copy(states, _all_slots(states), pool, indices)
    return states


def state_scatter(pool: torch.Tensor, indices: torch.Tensor, states: torch.Tensor) -> None:
    """Put ``states[i]`` into slot ``indices[i]`` of the pool; -1 drops it."""
    state_copy(pool, indices, states, _all_slots(states))


def state_fork(pool: torch.Tensor, src_indices: torch.Tensor, dst_indices: torch.Tensor) -> None:
    """Copy slots within a pool as if all were read before any is written: beam search reorders and
    duplicates states this way. -1 on either side skips a copy."""
    states = state_gather(pool, src_indices)
    state_copy(pool, dst_indices, states, torch.where(src_indices < 0, -1, _all_slots(states)))


def state_rollback(
    pool: torch.Tensor, indices: torch.Tensor, snapshots: torch.Tensor, steps: torch.Tensor | int
) -> None:
    """Put each sequence's state of ``steps`` tokens ago back into the pool.

    Args:
        pool: ``(S, ...)``, the states.
        indices: int32 ``(n,)``, each sequence's slot; -1 skips it.
        snapshots: ``(n, K, ...)`` as the recurrent ops return them: ``snapshots[i, k]`` is the state
            k tokens before the end.
        steps: how many tokens to take back, 0 <= steps < K, for all or int32 ``(n,)``.

    Rolling back is bit-identical to never having run the rejected tokens.
    """
    kept = snapshots.shape[1]
    if isinstance(steps, int):
        steps = torch.full_like(indices, steps)
    if steps.shape != indices.shape:
        raise ValueError(
            f"state_rollback: steps must have shape {tuple(indices.shape)}, "
            f"got {tuple(steps.shape)}"
        )
    if steps.numel() and not bool(((steps >= 0) & (steps < kept)).all()):
        raise ValueError(
            f"state_rollback: steps must be in [0, {kept}), got {steps.tolist()}: "
            "ask the recurrent op for more snapshots"
        )
    chosen = _all_slots(snapshots) * kept + steps
    state_copy(pool, indices, snapshots.flatten(0, 1), chosen.to(torch.int32))
