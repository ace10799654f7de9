"""16 streams together over the same engine one request at a time: a Mamba and a hybrid.

Models from their configurations with seeded random weights, float32: Mamba-130M's shape (24 layers of
768, state 16, vocabulary 50280, tied), and a Bamba (Mamba-2 layers and, every fourth, attention; 8
layers of 1024, vocabulary 32000). 16 prompts of 16 to 64 tokens, 64 tokens each, greedy; the tokens
of both ways must be equal. Batches of the engine are continuous: prompts join as chunks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import BambaConfig, BambaForCausalLM, PreTrainedModel

from bench.peers.common import OURS, Side, arguments, measure
from bench.peers.hf_models import mamba_130m
from effinfer import Engine, SamplingParams

STREAMS, OUTPUT = 16, 64
PROMPTS = (16, 64)  # the shortest and the longest
ALONE = "one at a time"

Tokens = list[tuple[int, ...]]


def hybrid() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        attn_layer_indices=[3, 7],
        mamba_n_heads=32,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_d_state=128,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return BambaForCausalLM(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"Mamba": mamba_130m, "hybrid": hybrid}


def prompts(vocab: int) -> list[list[int]]:
    """Seeded ids; lengths evenly spread."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*PROMPTS, STREAMS).round().int().tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def compare(name: str, args: argparse.Namespace) -> None:
    case = f"{name}, {STREAMS} streams, threads={args.threads}"
    if args.cases not in case:
        return
    model = MODELS[name]()
    # Nothing is kept from run to run.
    engine = Engine(
        model, max_slots=STREAMS, max_positions=256, prefix_cache=False, eos_token_ids=()
    )
    params = SamplingParams(max_tokens=OUTPUT)
    work = prompts(model.config.vocab_size)
    tokens: dict[str, Tokens] = {}

    def together() -> None:
        tokens[OURS] = [tuple(output.tokens) for output in engine.generate(work, params)]

    def alone() -> None:
        outputs = [engine.generate([prompt], params)[0] for prompt in work]
        tokens[ALONE] = [tuple(output.tokens) for output in outputs]

    def facts() -> dict[str, Any]:
        if len(tokens) == 2 and tokens[OURS] != tokens[ALONE]:
            raise AssertionError(f"{name}: the tokens of the streams together are other ones")
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "prompt_tokens": sum(map(len, work)),
        }

    measure(
        "engine_streams",
        case,
        {OURS: lambda: Side(together), ALONE: lambda: Side(alone)},
        args,
        unit={"tok/s": STREAMS * OUTPUT},
        facts=facts,
    )
    engine.close()


def main() -> None:
    args = arguments(__doc__)
    args.seconds *= 4  # a call generates 1024 tokens
    for name in MODELS:
        compare(name, args)


if __name__ == "__main__":
    main()
