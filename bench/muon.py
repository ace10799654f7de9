"""Muon: momentum whose update of each matrix is replaced by the nearest orthogonal one.

Not compared with AdamW alone on this model. torch.optim.Muon is the same rule but
orthogonalises in bfloat16, which costs 15 times as much as float32 on a CPU without bf16 units.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients of Muon (Jordan et al., 2024): singular values land near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values of about 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.t()
        x = _A * x + torch.addmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return x.t() if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                velocity = state["velocity"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(velocity, group["momentum"])
                gain = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(orthogonalized(nesterov), alpha=-group["lr"] * gain)
