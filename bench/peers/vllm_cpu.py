"""vLLM's CPU operators, loaded as a library file; its wheel pins another torch."""

from __future__ import annotations

import torch

from bench.peers.common import PeerUnavailable, peers_dir


def load_vllm() -> str:
    """Makes torch.ops._C hold vLLM's operators; returns the wheel's name."""
    folder = peers_dir() / "vllm"
    library = folder / "_C_AVX2.abi3.so"
    if not library.exists():
        raise PeerUnavailable(f"no {library.name} beside the other peers")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise PeerUnavailable(f"vLLM's library does not load: {error}") from error
    return (folder / "version.txt").read_text().strip()


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
) -> torch.Tensor:
    """One packed sequence, as vLLM's CPU mixer calls it: x (L,H,P), dt (L,H), b and c (L,G,N)."""
    step = torch.nn.functional.softplus(dt + dt_bias)
    out = torch.empty_like(x)
    states = torch.zeros(1, *x.shape[1:], b.shape[-1])
    ends = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    torch.ops._C.mamba_chunk_scan_fwd_cpu(out, states, x, step, a, b, c, d, None, ends)
    return out
