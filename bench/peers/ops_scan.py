"""selective_scan and ssd of 512 tokens: effinfer, transformers, mambapy, ggml, vLLM's CPU ops."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.peers import vllm_cpu
from bench.peers.common import PeerUnavailable, Side, arguments, measure, peers_dir
from bench.peers.ggml import Graph

LENGTH = 512
CHANNELS, STATE = 1536, 16
HEADS, HEAD_DIM, SSD_STATE = 24, 64, 128


def _time_major(*shape: int) -> torch.Tensor:
    """(B,D,L) views of time-major memory, as transformers' projections leave them."""
    return torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2)


def scan_inputs() -> SimpleNamespace:
    torch.manual_seed(0)
    xz = _time_major(1, 2 * CHANNELS, LENGTH)
    b, c = (_time_major(1, STATE, LENGTH) for _ in range(2))
    return SimpleNamespace(
        u=_time_major(1, CHANNELS, LENGTH),
        z=xz[:, CHANNELS:],
        delta=torch.randn(1, CHANNELS, LENGTH) * 0.5,
        A=-torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1),
        B=b,
        C=c,
        D=torch.ones(CHANNELS),
        bias=torch.full((CHANNELS,), -4.0),
    )


def scan_effinfer(i: SimpleNamespace, *, time_major: bool) -> Side:
    from effinfer import ops

    delta = i.delta.transpose(1, 2).contiguous().transpose(1, 2) if time_major else i.delta
    return Side(
        lambda: ops.selective_scan(
            i.u, delta, i.A, i.B, i.C, i.D, z=i.z, delta_bias=i.bias, delta_softplus=True
        )[0]
    )


def scan_transformers(i: SimpleNamespace) -> Side:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return Side(
        lambda: mamba_selective_scan(
            i.u, i.delta, i.A, i.B, i.C, D=i.D, z=i.z, delta_bias=i.bias, delta_softplus=True,
            return_last_state=True,
        )[0]
    )  # fmt: skip


def scan_mambapy(i: SimpleNamespace) -> Side:
    """mambapy's block from delta's softplus to the gate; its method uses nothing of self."""
    peers_dir()
    try:
        from mambapy.mamba import MambaBlock
    except ImportError as error:
        raise PeerUnavailable(f"mambapy does not import: {error}") from error
    u, z, b, c = (t.transpose(1, 2) for t in (i.u, i.z, i.B, i.C))
    delta = i.delta.transpose(1, 2).contiguous()

    def run() -> torch.Tensor:
        step = F.softplus(delta + i.bias)
        y = MambaBlock.selective_scan(None, u, step, i.A, b, c, i.D)
        return (y * F.silu(z)).transpose(1, 2)

    return Side(run)


def scan_ggml(i: SimpleNamespace, threads: int) -> Side:
    """llama.cpp's Mamba-1 chain: bias, ssm_scan, D, gate (the copy of its strided z left out)."""
    graph = Graph(64, threads)
    u = graph.tensor(i.u[0].T)
    x = graph.op("reshape_4d", u, 1, CHANNELS, LENGTH, 1)
    step = graph.op("add", graph.tensor(i.delta[0].T), graph.tensor(i.bias))
    b, c = (graph.tensor(t[0].T[None, :, None]) for t in (i.B, i.C))
    state = graph.tensor(torch.zeros(1, CHANNELS, 1, STATE))
    first = graph.tensor(torch.zeros(1, dtype=torch.int32))
    scanned = graph.op("ssm_scan", state, x, step, graph.tensor(i.A), b, c, first, 1)
    y = graph.op("view_4d", scanned, CHANNELS, LENGTH, 1, 1, *[4 * CHANNELS] * 3, 0)
    y = graph.op("add", y, graph.op("mul", u, graph.tensor(i.D)))
    y = graph.op("swiglu_split", graph.tensor(i.z[0].T), y)
    graph.finish(y)
    return Side(graph.run, lambda: graph.read(y, LENGTH, CHANNELS).T[None])


def ssd_inputs() -> SimpleNamespace:
    torch.manual_seed(0)
    inner = HEADS * HEAD_DIM
    xbc = F.silu(torch.randn(1, LENGTH, inner + 2 * SSD_STATE))
    return SimpleNamespace(
        x=xbc[..., :inner].unflatten(-1, (HEADS, HEAD_DIM)),
        B=xbc[..., None, inner : inner + SSD_STATE],
        C=xbc[..., None, inner + SSD_STATE :],
        dt=torch.randn(1, LENGTH, HEADS) * 0.5,
        A=-torch.arange(1.0, HEADS + 1),
        D=torch.ones(HEADS),
        bias=torch.full((HEADS,), -4.0),
    )


def ssd_effinfer(i: SimpleNamespace) -> Side:
    from effinfer import ops

    return Side(
        lambda: ops.ssd(i.x, i.dt, i.A, i.B, i.C, 64, i.D, dt_bias=i.bias, dt_softplus=True)[0]
    )


def ssd_transformers(i: SimpleNamespace) -> Side:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return Side(
        lambda: mamba2_chunk_scan(
            i.x, i.dt, i.A, i.B, i.C, 256, D=i.D, dt_bias=i.bias, dt_softplus=True,
            return_final_states=True,
        )[0]
    )  # fmt: skip


def ssd_ggml(i: SimpleNamespace, threads: int) -> Side:
    """llama.cpp's Mamba-2 chain without its gate: bias, ssm_scan with one A a head, D."""
    graph = Graph(64, threads)
    x = graph.tensor(i.x[0])
    step = graph.op("add", graph.tensor(i.dt[0]), graph.tensor(i.bias))
    b, c = (graph.tensor(t[0]) for t in (i.B, i.C))
    state = graph.tensor(torch.zeros(1, HEADS, HEAD_DIM, SSD_STATE))
    first = graph.tensor(torch.zeros(1, dtype=torch.int32))
    scanned = graph.op("ssm_scan", state, x, step, graph.tensor(i.A[:, None]), b, c, first, 1)
    row = 4 * HEAD_DIM
    strides = (row, row * HEADS, row * HEADS * LENGTH)
    y = graph.op("view_4d", scanned, HEAD_DIM, HEADS, LENGTH, 1, *strides, 0)
    y = graph.op("add", y, graph.op("mul", x, graph.tensor(i.D[:, None])))
    graph.finish(y)
    return Side(graph.run, lambda: graph.read(y, 1, LENGTH, HEADS, HEAD_DIM))


def ssd_vllm(i: SimpleNamespace) -> Side:
    vllm_cpu.load_vllm()
    x, dt, b, c = (t[0].contiguous() for t in (i.x, i.dt, i.B, i.C))
    return Side(lambda: vllm_cpu.chunk_scan(x, dt, i.A, b, c, i.D, i.bias)[None])


def main() -> None:
    args = arguments(__doc__)
    i = scan_inputs()
    reference = scan_transformers(i)
    measure(
        "ops_scan",
        f"selective_scan D{CHANNELS} N{STATE} L{LENGTH}, threads={args.threads}",
        {
            "effinfer": lambda: scan_effinfer(i, time_major=False),
            "effinfer, delta time-major": lambda: scan_effinfer(i, time_major=True),
            "transformers": lambda: reference,
            "mambapy": lambda: scan_mambapy(i),
            "ggml": lambda: scan_ggml(i, args.threads),
        },
        args,
        reference=reference.output,
    )
    j = ssd_inputs()
    stock = ssd_transformers(j)
    measure(
        "ops_scan",
        f"ssd H{HEADS} P{HEAD_DIM} N{SSD_STATE} L{LENGTH}, threads={args.threads}",
        {
            "effinfer": lambda: ssd_effinfer(j),
            "transformers": lambda: stock,
            "ggml": lambda: ssd_ggml(j, args.threads),
            "vllm": lambda: ssd_vllm(j),
        },
        args,
        reference=stock.output,
    )


if __name__ == "__main__":
    main()
