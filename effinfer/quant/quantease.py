"""QuantEase (arXiv 2309.01885): coordinate descent on the error of a layer's outputs."""

from __future__ import annotations

import torch

from effinfer.ops.lowbit_weight import LowBitWeight
from effinfer.quant.gptq import check_hessian, gptq
from effinfer.quant.grid import Grid, check_weight, fit_grid, nearest, value

BLOCK = 128  # columns whose common part is one matrix product
SWEEPS, SWEEPS_AFTER_GPTQ = 25, 10


def quantease(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    format: str = "int4",
    group_size: int = 128,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype = torch.float16,
    sweeps: int = SWEEPS,
    start: LowBitWeight | None = None,
) -> LowBitWeight:
    """Quantize ``weight`` by minimising ``|(W - Q) X|`` one column at a time, all others fixed.

    Column ``j`` of a sweep goes to the grid value nearest to the unconstrained minimiser
    ``Q_j + ((W - Q) S)_j / S_jj`` with ``S = X X^T``. Every third sweep leaves the columns on that
    minimiser, off the grid: from there the next sweep reaches better values. Nothing is inverted
    and nothing damped. The result is never worse than the start.

    Args:
        weight, hessian, format, group_size, symmetric, scale_dtype: as for
            :func:`effinfer.quant.gptq`.
        sweeps: over all columns.
        start: a quantized weight to begin from, whose scales are kept; by default the weight
            itself, whose first sweep rounds it column by column.

    Raises:
        ValueError, TypeError: as for ``rtn``, or a ``hessian`` of another shape or not finite.
    """
    weight = check_weight("quantease", weight)
    hessian = check_hessian("quantease", hessian, weight.shape[1])
    if sweeps < 1:
        raise ValueError(f"quantease: sweeps must be 1 or more, got {sweeps}")
    if start is None:
        cost = hessian.diagonal()
        grid = fit_grid("quantease", weight, format, group_size, symmetric, scale_dtype, cost)
        first = grid.weight(grid.codes(weight))
        begin = weight
    else:
        if start.order is not None or start.format != format or start.codes.shape != weight.shape:
            raise ValueError(
                "quantease: start must be of the same format and shape, in plain order"
            )
        grid = Grid(format, start.group_size, start.scale, start.zero, start.offset)
        first, begin = start, start.dequantize()
    descent = _Descent(weight, hessian, grid, begin)
    for sweep in range(sweeps):
        descent.sweep(relaxed=sweep % 3 == 1 and sweep < sweeps - 1)
    found = grid.weight(descent.codes.t().contiguous())
    better = output_error(weight, found.dequantize(), hessian) < output_error(
        weight, first.dequantize(), hessian
    )
    return found if better else first


def gptq_then_quantease(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    format: str = "int4",
    group_size: int = 128,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype = torch.float16,
    damping: float = 0.01,
    sweeps: int = SWEEPS_AFTER_GPTQ,
) -> LowBitWeight:
    """:func:`quantease` from :func:`gptq`'s result, whose few sweeps come near the full number."""
    start = gptq(
        weight,
        hessian,
        format=format,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        damping=damping,
    )
    return quantease(weight, hessian, format=format, sweeps=sweeps, start=start)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``|(W - Q) X| / |W X|`` with ``hessian = X^T X``; 0 where there is nothing to get wrong."""
    lost, whole = _energy(weight.float() - quantized.float(), hessian), _energy(weight, hessian)
    if whole <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return float((max(lost, 0.0) / whole) ** 0.5)


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """``|W X|^2``."""
    weight, hessian = weight.float(), hessian.float()
    return float((weight @ hessian).mul_(weight).sum(dtype=torch.float64))


class _Descent:
    """The state of the descent, columns of the weight as dense rows ``(K, N)``."""

    def __init__(
        self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, begin: torch.Tensor
    ) -> None:
        self.format, self.group_size = grid.format, grid.group_size
        self.columns = grid.columns()
        diagonal = hessian.diagonal()
        # A column that calibration never saw costs nothing: it stays at its nearest value.
        step = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-38), 0)
        self.pull = hessian * step[:, None]  # (j, k): how an error in k moves the minimiser of j
        self.seen = (diagonal > 0).tolist()
        self.target = weight.t().contiguous()
        self.values = begin.t().contiguous()
        self.error = self.target - self.values
        self.codes = torch.zeros(self.values.shape, dtype=torch.uint8, device=weight.device)

    def sweep(self, relaxed: bool) -> None:
        """Every column once, in ascending order."""
        k, n = self.values.shape
        for first in range(0, k, BLOCK):
            last = min(first + BLOCK, k)
            block = slice(first, last)
            # Minimisers as the columns before this block left them ...
            aim = torch.addmm(self.values[block], self.pull[block], self.error)
            inner = self.pull[block, block].clone()
            inner.diagonal().zero_()
            change = aim.new_zeros(last - first, n)
            for i, j in enumerate(range(first, last)):
                # ... and as those before this one in it did since.
                wanted = (
                    aim[i]
                    if i == 0
                    else torch.addmv(aim[i], change[:i].t(), inner[i, :i], alpha=-1)
                )
                if not self.seen[j]:
                    wanted = self.target[j]
                if relaxed:
                    new = wanted
                else:
                    column = self.columns[j // self.group_size]
                    code = nearest(self.format, wanted, column)
                    self.codes[j] = code
                    new = value(self.format, code, column)
                torch.sub(new, self.values[j], out=change[i])
            self.values[block] += change
            torch.sub(self.target[block], self.values[block], out=self.error[block])
