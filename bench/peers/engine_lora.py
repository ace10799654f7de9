"""What the loops' own low-rank additions cost: the same model with and without, mixed depths.

    python -m bench.peers.engine_lora --threads 1

Exits are replayed, so that rows of all four loops share launches, which then read four loops'
additions. Rank 38 is 5 % of the block's width (each loop's additions are 7.8 % of the block's
weights); rank 6 makes the additions of all loops together 5 % of the block.
"""

from __future__ import annotations

from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.recursive_sides import Busy, exits, random_model
from effinfer.engine.policies import replay

TOKENS = 64
WITHOUT = "without"


def main() -> None:
    args = arguments(__doc__)
    without = random_model("first", lora_rank=0)
    for rank in (6, 38):
        model = random_model("first", lora_rank=rank)
        for batch in (1, 4, 16):
            policy = replay(exits(batch, TOKENS))

            def side(served: object, batch: int = batch, policy: object = policy) -> Side:
                return Side(Busy(served, batch, TOKENS, mode="exit", policy=policy).run)

            measure(
                "engine_lora",
                f"rank {rank}, batch {batch}, threads={args.threads}",
                {OURS: lambda m=model, s=side: s(m), WITHOUT: lambda s=side: s(without)},
                args,
                facts=lambda b=batch: {"batch": b},
            )


if __name__ == "__main__":
    main()
