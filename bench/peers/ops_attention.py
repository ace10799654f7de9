"""Attention of a model's step: effinfer's paged_attention and torch's scaled_dot_product_attention.

torch has no pages on a CPU, so its keys lie dense: `sdpa` pads ragged sequences to the longest, with a
mask; `sdpa each` takes one sequence after another. Ours read pages of 16 in random order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.peers.common import Side, arguments, measure

BLOCK = 16


class Workload:
    """The last ``rows`` tokens of sequences of these lengths, attending to all before them."""

    def __init__(
        self, lengths: list[int], rows: int, heads: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        q_heads, kv_heads, dim = heads
        self.lengths, self.rows = lengths, rows
        self.q = torch.randn(len(lengths), q_heads, rows, dim).to(dtype)
        self.k, self.v = (
            [torch.randn(kv_heads, n, dim).to(dtype) for n in lengths] for _ in range(2)
        )

    def effinfer(self) -> Side:
        from effinfer.engine.kv import KVPages
        from effinfer.ops import paged_attention

        pages = [-(-n // BLOCK) for n in self.lengths]
        free = torch.randperm(sum(pages)).tolist()
        table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        kv_heads, _, dim = self.k[0].shape
        pool = KVPages(
            [(kv_heads, dim)], planes=1, blocks=sum(pages), block_size=BLOCK, dtype=self.q.dtype
        )
        k_pages, v_pages = pool.keys[0][0], pool.values[0][0]
        for s, n in enumerate(self.lengths):
            table[s, : pages[s]] = torch.tensor([free.pop() for _ in range(pages[s])])
            t = torch.arange(n)
            block = table[s].long()[t // BLOCK]
            k_pages[block, t % BLOCK] = self.k[s].transpose(0, 1)
            v_pages[block, t % BLOCK] = self.v[s].transpose(0, 1)
        rows = self.rows
        q = self.q.transpose(1, 2).flatten(0, 1).contiguous()
        sequence = torch.arange(len(pages), dtype=torch.int32).repeat_interleave(rows)
        position = torch.cat([torch.arange(n - rows, n) for n in self.lengths]).int()
        return Side(lambda: paged_attention(q, k_pages, v_pages, table, sequence, position))

    def _as_rows(self, out: torch.Tensor) -> torch.Tensor:
        return out.transpose(1, 2).flatten(0, 1)

    def sdpa(self) -> Side:
        longest = max(self.lengths)
        k, v = (
            torch.stack([F.pad(t, (0, 0, longest - t.shape[1], 0)) for t in parts])
            for parts in (self.k, self.v)
        )
        mask = None
        if min(self.lengths) < longest:
            padding = torch.tensor([longest - n for n in self.lengths])
            mask = (torch.arange(longest) >= padding[:, None])[:, None, None]
        causal = self.rows > 1
        return Side(
            lambda: self._as_rows(
                F.scaled_dot_product_attention(
                    self.q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
                )
            )
        )

    def sdpa_each(self) -> Side:
        def run() -> torch.Tensor:
            parts = [
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                for q, k, v in zip(self.q, self.k, self.v, strict=True)
            ]
            return self._as_rows(torch.stack(parts))

        return Side(run)


def compare(
    what: str,
    lengths: list[int],
    rows: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> None:
    torch.manual_seed(0)
    work = Workload(lengths, rows, heads, dtype)
    factories: dict[str, Callable[[], Side]] = {"effinfer": work.effinfer, "sdpa": work.sdpa}
    if rows == 1 and len(lengths) > 1:
        factories["sdpa each"] = work.sdpa_each
    q_heads, kv_heads, dim = heads
    name = str(dtype).removeprefix("torch.")
    measure(
        "ops_attention",
        f"{what} h{q_heads}/{kv_heads} d{dim} {name}, threads={args.threads}",
        factories,
        args,
        reference=work.sdpa().output,
        bound=1e-5 if dtype is torch.float32 else 1e-2,
    )


def main() -> None:
    args = arguments(__doc__)
    ragged = [64 + 128 * i for i in range(16)]
    for heads in ((8, 8, 64), (32, 8, 128)):
        compare("prompt of 512", [512], 512, heads, torch.float32, args)
        for dtype in (torch.float32, torch.bfloat16):
            compare("decode 16 x 1024", [1024] * 16, 1, heads, dtype, args)
            compare("decode 16 x 64..1984", ragged, 1, heads, dtype, args)


if __name__ == "__main__":
    main()
