"""A fast, differentiable Mamba-1 forward over the parameters of a stock `MambaForCausalLM`.

transformers' own CPU path walks the time axis in Python under autograd and keeps every
(batch, channel, state) tensor of every position alive: about 100 times too slow to train with.
Here activations are time-major, the scan is an autograd.Function that stores the state once per
chunk and recomputes the rest in its backward, and each chunk is unrolled so that torch.compile
fuses it into a few loops with the state in registers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaForCausalLM

CHUNK = 16  # time steps fused into one compiled loop: longer only makes the compiler slower


@torch.compile(dynamic=False)
def _scan_chunk(
    h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """CHUNK steps of h = exp(delta A) h + delta u B, y = <h, C>; the state h is (batch, N, E)."""
    ys = []
    for t in range(CHUNK):
        decay = torch.exp(delta[t].unsqueeze(1) * A)
        h = decay * h + (delta[t] * u[t]).unsqueeze(1) * B[t].unsqueeze(2)
        ys.append((h * C[t].unsqueeze(2)).sum(1))
    return torch.stack(ys), h


@torch.compile(dynamic=False)
def _scan_chunk_backward(
    grad_h: Tensor,
    grad_y: Tensor,
    h: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of one chunk from the gradient of its last state; recomputes states from h."""
    states, decays = [h], []
    for t in range(CHUNK):
        decays.append(torch.exp(delta[t].unsqueeze(1) * A))
        drive = (delta[t] * u[t]).unsqueeze(1) * B[t].unsqueeze(2)
        states.append(decays[t] * states[t] + drive)
    grad_u, grad_delta, grad_B, grad_C = [], [], [], []
    grad_A = torch.zeros_like(h)
    for t in reversed(range(CHUNK)):
        grad_h = grad_h + C[t].unsqueeze(2) * grad_y[t].unsqueeze(1)
        grad_C.append((states[t + 1] * grad_y[t].unsqueeze(1)).sum(2))
        grad_B.append((grad_h * (delta[t] * u[t]).unsqueeze(1)).sum(2))
        grad_drive = (grad_h * B[t].unsqueeze(2)).sum(1)
        grad_h = grad_h * decays[t]
        grad_exponent = grad_h * states[t]
        grad_u.append(grad_drive * delta[t])
        grad_delta.append(grad_drive * u[t] + (grad_exponent * A).sum(1))
        grad_A = grad_A + grad_exponent * delta[t].unsqueeze(1)
    by_time = [torch.stack(g[::-1]) for g in (grad_u, grad_delta, grad_B, grad_C)]
    return (grad_h, grad_A.sum(0), *by_time)


class _SelectiveScan(torch.autograd.Function):
    """y (T, batch, E) from u, delta (T, batch, E), A (N, E) and B, C (T, batch, N)."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C):  # type: ignore[no-untyped-def]
        h = u.new_zeros(u.shape[1], *A.shape)
        ys, starts = [], []
        for u_c, delta_c, B_c, C_c in zip(*(x.split(CHUNK) for x in (u, delta, B, C)), strict=True):
            starts.append(h)
            y, h = _scan_chunk(h, u_c, delta_c, A, B_c, C_c)
            ys.append(y)
        ctx.save_for_backward(u, delta, A, B, C)
        ctx.starts = starts
        return torch.cat(ys)

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        u, delta, A, B, C = ctx.saved_tensors
        grad_h = torch.zeros_like(ctx.starts[0])
        grad_A = torch.zeros_like(A)
        pieces = []
        for i in reversed(range(len(ctx.starts))):
            at = slice(i * CHUNK, (i + 1) * CHUNK)
            grad_h, grad_A_c, *piece = _scan_chunk_backward(
                grad_h, grad_y[at], ctx.starts[i], u[at], delta[at], A, B[at], C[at]
            )
            grad_A += grad_A_c
            pieces.append(piece)
        grad_u, grad_delta, grad_B, grad_C = (
            torch.cat(p) for p in zip(*reversed(pieces), strict=True)
        )
        return grad_u, grad_delta, grad_A, grad_B, grad_C


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@torch.compile(dynamic=False)
def _before_scan(
    x: Tensor,
    norm: Tensor,
    eps: float,
    w_in: Tensor,
    w_conv: Tensor,
    b_conv: Tensor,
    w_x: Tensor,
    w_dt: Tensor,
    b_dt: Tensor,
    state_size: int,
) -> tuple[Tensor, ...]:
    """Norm, input projection, convolution and the input-dependent delta, B and C of one layer."""
    u, gate = F.linear(_rms_norm(x, norm, eps), w_in).chunk(2, dim=-1)
    width, steps = w_conv.shape[-1], u.shape[0]
    padded = F.pad(u, (0, 0, 0, 0, width - 1, 0))
    taps = (padded[k : k + steps] * w_conv[:, 0, k] for k in range(width))
    u = F.silu(sum(taps, start=b_conv))
    rank = w_dt.shape[1]
    dt, B, C = F.linear(u, w_x).split([rank, state_size, state_size], dim=-1)
    delta = F.softplus(F.linear(dt, w_dt, b_dt))
    return u, gate, delta, B.contiguous(), C.contiguous()


@torch.compile(dynamic=False)
def _after_scan(x: Tensor, y: Tensor, u: Tensor, gate: Tensor, D: Tensor, w_out: Tensor) -> Tensor:
    return x + F.linear((y + u * D) * F.silu(gate), w_out)


def training_logits(model: MambaForCausalLM, input_ids: Tensor) -> Tensor:
    """Logits (T, batch, vocab) of input_ids (batch, T), T a multiple of CHUNK."""
    if input_ids.shape[1] % CHUNK:
        raise ValueError(f"input_ids must hold a multiple of {CHUNK} positions per row")
    backbone = model.backbone
    x = backbone.embeddings(input_ids.t())
    for layer in backbone.layers:
        mixer = layer.mixer
        u, gate, delta, B, C = _before_scan(
            x,
            layer.norm.weight,
            layer.norm.variance_epsilon,
            mixer.in_proj.weight,
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            mixer.x_proj.weight,
            mixer.dt_proj.weight,
            mixer.dt_proj.bias,
            mixer.ssm_state_size,
        )
        A = -torch.exp(mixer.A_log).t().contiguous()
        y = _SelectiveScan.apply(u, delta, A, B, C)
        x = _after_scan(x, y, u, gate, mixer.D, mixer.out_proj.weight)
    x = _rms_norm(x, backbone.norm_f.weight, backbone.norm_f.variance_epsilon)
    return F.linear(x, model.lm_head.weight)


def training_loss(model: MambaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean next-token loss of tokens (batch, T + 1)."""
    logits = training_logits(model, tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].t().flatten())


def check_against_stock(model: MambaForCausalLM, tokens: Tensor) -> tuple[float, float]:
    """Relative L2 difference of logits, and of all gradients, from the stock forward's."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    def gradients(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    model.eval()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    stock = model(inputs, use_cache=False).logits
    stock_loss = F.cross_entropy(stock.flatten(0, 1), targets.flatten())
    ours = training_logits(model, inputs).transpose(0, 1)
    return (
        relative(ours.detach(), stock.detach()),
        relative(gradients(training_loss(model, tokens)), gradients(stock_loss)),
    )
