"""The layer of S5 (arXiv 2208.04933): dense products around a diagonal complex recurrence."""

from __future__ import annotations

import torch

from effinfer.ops.selective_scan_lti import selective_scan_lti


def selective_scan_s5(
    u: torch.Tensor,
    Lambda_bar: torch.Tensor,
    B_bar: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    conjugate_pairs: bool = True,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reverse: bool = False,
    num_snapshots: int = 0,
) -> tuple[torch.Tensor, ...]:
    """``x_t = Lambda_bar x_{t-1} + B_bar u_t``, ``y_t = Re(C x_t) + D u_t``: all inputs, one state.

    ``discretize(Lambda, B, step)`` makes ``Lambda_bar`` and ``B_bar``. Made of
    ``selective_scan_lti`` and torch's matrix products.

    Args:
        u: ``(B, H, L)``, float32, bfloat16 or float16.
        Lambda_bar: ``(P,)`` complex64.
        B_bar, C: ``(P, H)`` and ``(H, P)`` complex64.
        D: ``(H,)`` float32.
        conjugate_pairs: each state stands for itself and its conjugate: ``y = 2 Re(C x) + D u``.
        initial_state: ``(B, P)``, or ``(S, P)`` with ``cu_seqlens``; zeros when None.
        cu_seqlens, mask, reverse, num_snapshots: as in ``selective_scan_lti``.

    Returns:
        ``(y, last_state)``: (B, H, L) in ``u``'s dtype and (B or S, P) complex64; with snapshots a third,
        ``(B or S, K, P)``. A masked position gives 0 and leaves the state alone.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        RuntimeError: an input requires grad.
    """
    size = Lambda_bar.shape[0] if Lambda_bar.dim() == 1 else -1
    channels = u.shape[1] if u.dim() == 3 else -1
    if B_bar.shape != (size, channels) or C.shape != (channels, size):
        raise ValueError(
            "selective_scan_s5: u, Lambda_bar, B_bar, C must have shapes (B, H, L), (P,), (P, H), "
            f"(H, P), got {', '.join(str(tuple(x.shape)) for x in (u, Lambda_bar, B_bar, C))}"
        )
    x = u.movedim(1, -1).float()
    inputs = (x @ torch.cat([B_bar.real, B_bar.imag]).t()).movedim(-1, 1)
    if initial_state is not None:
        initial_state = torch.cat([initial_state, torch.zeros_like(initial_state)], -1)[..., None]
    decay = torch.cat([Lambda_bar, Lambda_bar])[:, None]
    one = torch.ones_like(Lambda_bar)

    # The native scan takes real inputs and gives real outputs. The recurrence is linear: 2P channels
    # of one state each scan its real and its imaginary inputs, a and b, and x = a + 1j b.
    def scan(a_weight: torch.Tensor, b_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Re(a_weight a + b_weight b) at every position, (B, L, P), and the states."""
        y, *states = selective_scan_lti(
            inputs, decay, torch.ones_like(decay), torch.cat([a_weight, b_weight])[:, None],
            initial_state=initial_state, cu_seqlens=cu_seqlens, mask=mask, reverse=reverse,
            num_snapshots=num_snapshots,
        )  # fmt: skip
        a, b = y.movedim(1, -1).chunk(2, -1)
        return a + b, *states

    real, *states = scan(one, 1j * one)
    imag = scan(-1j * one, one)[0]
    y = real @ C.real.t() - imag @ C.imag.t()
    if conjugate_pairs:
        y = 2 * y
    if D is not None:
        y = y + D * x
    if mask is not None:
        y = torch.where(mask[..., None], y, torch.zeros_like(y))
    return y.to(u.dtype).movedim(-1, 1), *(_join(state[..., 0]) for state in states)


def _join(states: torch.Tensor) -> torch.Tensor:
    a, b = states.chunk(2, -1)
    return a + 1j * b
